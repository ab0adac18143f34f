"""A folder of images: one subfolder a class, with `train`, `val` and `test` above them or not."""

from __future__ import annotations

import math
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eps_core.errors import DataError
from eps_core.preprocessing import Preprocessing, upright_size
from eps_train.data.images import FileSet, Source

# -- Class folders on disk: which files there are, and who they are

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


_PARTS = {  # what the folders of parts are called in public sets, in whatever case
    "train": ("train", "training", "trn", "seg_train"),
    "val": ("val", "valid", "validation", "dev", "eval", "seg_val"),
    "test": ("test", "testing", "tests", "tst", "seg_test", "holdout"),
}
_PART_OF = {name: part for part, names in _PARTS.items() for name in names}
_GREY_MODES = ("1", "L", "LA")
_SAMPLE = 1_000  # files of a large set that are looked into


def read_folder(
    folder: Path,
    size: tuple[int, int] | None = None,
    *,
    room: int = sys.maxsize,
    known: Preprocessing | None = None,
) -> Source:
    """Find every image below `folder`.

    The parts of the source are `files.FileSet`; they are to be held in memory if they take no more
    than `room` bytes there. Of a set that is larger, 1,000 images, the same every time, tell
    whether it is grey or coloured.

    Args:
        folder: class folders, or `train` (and perhaps `val`, `test`) with class folders in each.
        size: height and width to bring the images to; None when they all share one size.
        room: bytes of pixels that may be held.
        known: how the images were read when they were read before, instead of `size`.

    Raises:
        DataError: names the folder or image that is missing, empty, or of another size.
    """
    if not folder.is_dir():
        raise DataError(
            f"data set folder:{folder}: no such folder; name where it lies with --data-root"
        )
    roots, unused = _roots(folder)
    found = {part: class_files(root) for part, root in roots.items()}
    classes = tuple(found["train"].by_class)
    paths = [
        roots[part] / name
        for part, files in found.items()
        for names in files.by_class.values()
        for name in names
    ]
    how = known or _preprocessing(folder, paths, size, room)
    parts: dict[str, FileSet] = {
        part: file_set(root, found[part].by_class, classes, how) for part, root in roots.items()
    }
    left_out: Counter[str] = Counter()
    for files in found.values():
        left_out.update(files.left_out)
    told = [in_words(left_out), f"the folders {', '.join(unused)}" if unused else ""]
    return Source(
        train=parts["train"],
        validation=parts.get("val"),
        test=parts.get("test"),
        classes=classes,
        preprocessing=how,
        folder=folder,
        held=_fits(paths, how, room),
        left_out=" and ".join(filter(None, told)),
    )


def _roots(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Where the class folders of each part lie, and the folders that are not looked into.

    Without a folder of training data, all of them are training data. A folder named like a part is
    one when there are folders in it: `train` may also be a class, beside `bus` and `car`.
    """
    inner = {name: folders(folder / name) for name in folders(folder)}
    named: dict[str, list[str]] = defaultdict(list)
    for name, below in inner.items():
        if below and name.lower() in _PART_OF:
            named[_PART_OF[name.lower()]].append(name)
    for part, names in named.items():
        if len(names) > 1:
            raise DataError(
                f"data set folder:{folder}: {' and '.join(names)} are both taken for the"
                f" {part} part; take one of them away"
            )
    roots = {part: folder / names[0] for part, names in sorted(named.items(), key=_usual_order)}
    if "train" in roots:
        return roots, [name for name in inner if folder / name not in roots.values()]
    if roots:
        root, *_ = roots.values()
        raise DataError(
            f"{root}: a part without {folder / 'train'}; add that, or put all class folders"
            f" directly into {folder}"
        )
    _refuse_folds(folder, inner)
    return {"train": folder}, []


def _usual_order(item: tuple[str, object]) -> int:
    return list(_PARTS).index(item[0])


def _refuse_folds(folder: Path, inner: dict[str, list[str]]) -> None:
    """Raise DataError when what lies in `folder` are not classes, but folders of classes."""
    outer = [name for name in inner if not loose_images(folder / name)]
    if len(inner) == 1 and outer and inner[outer[0]]:
        raise DataError(
            f"data set folder:{folder}: only one folder, {outer[0]}, with folders in it; if those"
            f" are the classes, give --dataset folder:{folder / outer[0]}"
        )
    shared = set.intersection(*map(set, inner.values())) if inner else set()
    if len(inner) > 1 and len(outer) == len(inner) and len(shared) > 1:
        raise DataError(
            f"data set folder:{folder}: all of {_few(list(inner))} have the same folders in them"
            f" ({_few(sorted(shared))}): they look like parts of the data, not like classes;"
            f" name them train, val and test, or put the class folders directly into {folder}"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _preprocessing(
    folder: Path, paths: Sequence[Path], size: tuple[int, int] | None, room: int
) -> Preprocessing:
    """How the files are to be read.

    Grey when every image is, else RGB; the size given, or the one that all images share.
    """
    every = None if size else _look(paths)
    if every is not None:
        size = _common_size(folder, every[0])
    assert size is not None
    few = random.Random(0).sample(paths, min(len(paths), _SAMPLE))
    how = _how(size, grey=_look(few)[1])
    if _fits(paths, how, room):
        how = _how(size, grey=(every or _look(paths))[1])
    return how


def _how(size: tuple[int, int], *, grey: bool) -> Preprocessing:
    return Preprocessing(resize=size, crop=size, color="grey" if grey else "rgb")


def _fits(paths: Sequence[Path], how: Preprocessing, room: int) -> bool:
    return len(paths) * math.prod(how.shape) <= room


def _common_size(folder: Path, sizes: Counter[tuple[int, int]]) -> tuple[int, int]:
    if not sizes:
        raise DataError(f"data set folder:{folder}: none of its images can be read")
    (common, _), *others = sizes.most_common()
    if others:
        raise DataError(
            f"data set folder:{folder}: images of {len(sizes)} sizes (most are"
            f" {common[0]}x{common[1]}); say which one to bring them to with --image-size"
        )
    return common


def _look(paths: Sequence[Path]) -> tuple[Counter[tuple[int, int]], bool]:
    """Upright sizes (height, width) of images, and whether all are grey; from their headers alone.

    What cannot be opened is left to whoever reads the pixels.
    """
    from PIL import Image

    sizes: Counter[tuple[int, int]] = Counter()
    grey = True
    for path in paths:
        try:
            with path.open("rb") as file, Image.open(file) as image:
                sizes[upright_size(image)] += 1
                grey = grey and (image.mode in _GREY_MODES or image.mode.startswith(("I", "F")))
        except Exception:  # Pillow raises many types for what is damaged
            continue
    return sizes, grey


# -- ImageNet (ILSVRC 2012) in its usual layout: `train` and `val`, in each a folder a class

SIZE = 224
_COVER = 256 / 224  # the shorter side is scaled to 256, of which the middle is taken (paper's code)
_WHAT = (
    "unpack ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar there, the images of each class in"
    " a folder of its own (train/n01440764/*.JPEG, val/n01440764/*.JPEG), or name another folder"
    " with --data-root"
)


def read_imagenet(root: Path, size: tuple[int, int] | None = None) -> Source:
    """List the files of both parts; `val`, which has labels, becomes the test part.

    The images stay on disk. Whatever classes are there will do: a subset in the same layout too.

    Args:
        root: the folder that holds `train` and `val`.
        size: height and width to crop at the centre; None: 224x224.

    Raises:
        DataError: one of the folders is missing, or not laid out like this.
    """
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise DataError(f"data set imagenet: no folder {part} in {root}; {_WHAT}")
    height, width = size or (SIZE, SIZE)
    preprocessing = Preprocessing(
        resize=(round(height * _COVER), round(width * _COVER)), crop=(height, width), color="rgb"
    )
    try:
        found = {part: class_files(root / part) for part in ("train", "val")}
    except DataError as error:
        raise DataError(f"data set imagenet: {error}; {_WHAT}") from None
    classes = tuple(found["train"].by_class)
    train, test = (
        file_set(root / part, files.by_class, classes, preprocessing)
        for part, files in found.items()
    )
    return Source(
        train=train,
        test=test,
        classes=classes,
        preprocessing=preprocessing,
        folder=root,
        left_out=in_words(found["train"].left_out + found["val"].left_out),
    )
