"""Class folders on disk: which files there are, and who they are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from eps_train.errors import DataError
from eps_train.files import FileSet
from eps_train.preprocess import Preprocessing

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def class_files(root: Path) -> dict[str, list[str]]:
    """Image files by class, relative to `root`, both in alphabetical order.

    Images may lie in folders below their class. What begins with a dot is left alone.
    Raises DataError for a class without images, and when there is no class at all.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(entry.name for entry in os.scandir(root) if entry.is_dir()):
        if name.startswith("."):
            continue
        files = [
            os.path.join(below, file)
            for folder, _, files in os.walk(root / name)
            for below in (os.path.relpath(folder, root),)  # once a folder: there may be a million
            for file in files
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        ]
        if not files:
            raise DataError(
                f"{root / name}: a class folder without images; fill it or take it away"
            )
        found[name] = sorted(files, key=lambda file: file.split(os.sep))
    if not found:
        loose = sum(name.lower().endswith(SUFFIXES) for name in os.listdir(root))
        among = f" but {loose:,} images" if loose else ""
        raise DataError(
            f"{root}: no class folders in it{among}; put the images of each class in one"
        )
    return found


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
