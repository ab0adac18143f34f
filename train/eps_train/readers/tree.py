"""Class folders on disk: which files there are, and who they are."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eps_train.errors import DataError
from eps_train.files import FileSet
from eps_train.preprocess import Preprocessing

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"),
    *(".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
_LINK, _CIRCLE = "links to nothing", "links that lead in a circle"

_Id = tuple[int, int]  # of a folder, whatever path leads to it


@dataclass(frozen=True, slots=True)
class ClassFiles:
    """What class folders hold.

    Attributes:
        by_class: image files relative to the folder of the class folders, both in alphabetical
            order.
        left_out: how many other files there are, by their suffixes, and other things by what they
            are.
    """

    by_class: dict[str, list[str]]
    left_out: Counter[str]


def folders(root: Path) -> list[str]:
    """Names of the folders in `root`, links to folders among them, in alphabetical order.

    What begins with a dot is left alone. Raises DataError when `root` cannot be looked into.
    """
    return sorted(
        entry.name for entry in _entries(root) if not entry.name.startswith(".") and entry.is_dir()
    )


def class_files(root: Path) -> ClassFiles:
    """Image files below `root`, a folder a class.

    Images may lie in folders below their class, and links are followed. What begins with a dot is
    left alone. Raises DataError when there is no class, for a class without images, for a folder
    that cannot be looked into, for a link to nothing in the place of a class, and for a class whose
    name is no text, which later commands could not write.
    """
    found = ClassFiles({}, Counter())
    for entry in _entries(root):
        if entry.name.startswith(".") or entry.is_dir():
            continue
        if entry.is_symlink() and not os.path.exists(entry.path):
            target = os.readlink(entry.path)
            raise DataError(f"{entry.path}: a link to nothing ({target}); repair it or remove it")
        found.left_out[_suffix(entry.name)] += 1
    for name in folders(root):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{root}: the name of class folder {os.fsencode(name)!r} is not UTF-8; rename it"
            ) from None
        files: list[str] = []
        _walk(root / name, name, (_identity(root),), files, found.left_out)
        if not files:
            raise DataError(
                f"{root / name}: a class folder without images; fill it or take it away"
            )
        found.by_class[name] = sorted(files, key=lambda file: file.split(os.sep))
    if not found.by_class:
        loose = loose_images(root)
        among = f" but {loose:,} images" if loose else ""
        raise DataError(
            f"{root}: no class folders in it{among}; put the images of each class in one"
        )
    return found


def loose_images(root: Path) -> int:
    """How many images lie in `root` itself."""
    return sum(_is_image(entry.name) for entry in _entries(root))


def _walk(
    folder: Path, name: str, above: tuple[_Id, ...], files: list[str], left_out: Counter[str]
) -> None:
    """Add the images below `folder`, whose path from the root is `name`, and count the rest.

    `above` are the folders that the way led through.
    """
    here = _identity(folder)
    if here in above:
        left_out[_CIRCLE] += 1
        return
    for entry in _entries(folder):
        if entry.name.startswith("."):
            continue
        path = os.path.join(name, entry.name)
        if entry.is_dir():
            _walk(folder / entry.name, path, (*above, here), files, left_out)
        elif _is_image(entry.name):
            files.append(path)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            left_out[_LINK] += 1
        else:
            left_out[_suffix(entry.name)] += 1


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be looked into: {error.strerror}; change who may read it"
        ) from None


def _identity(folder: Path) -> _Id:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no suffix"


def in_words(left_out: Mapping[str, int]) -> str:
    """`14 files (.heic 10, .txt 4)`, most frequent first; empty when it is nothing."""
    if not left_out:
        return ""
    total = sum(left_out.values())
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{kind} {count:,}" for kind, count in kinds[:6])
    more = f", {len(kinds) - 6} other kinds" if len(kinds) > 6 else ""
    return f"{total:,} {'file' if total == 1 else 'files'} ({named}{more})"


def file_set(
    root: Path,
    found: Mapping[str, Sequence[str]],
    classes: Sequence[str],
    preprocessing: Preprocessing,
) -> FileSet:
    """The files of :func:`class_files` with the labels of `classes`.

    Raises DataError for a class that is not among those.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = sorted(found.keys() - numbers.keys())
    if unknown:
        raise DataError(f"{root / unknown[0]}: a class that the training part lacks")
    names = [file for files in found.values() for file in files]
    labels = [numbers[name] for name, files in found.items() for _ in files]
    return FileSet.of(root, names, labels, preprocessing)
