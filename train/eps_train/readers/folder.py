"""A folder of images: one subfolder a class, with `train`, `val` and `test` above them or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from eps_train.errors import DataError
from eps_train.images import ImageSet, Source
from eps_train.preprocess import Preprocessing

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
PARTS = ("train", "val", "test")
_GREY_MODES = ("1", "L", "I", "I;16", "F")
_MEMORY = 8 << 30  # bytes of pixels that are held at most


def read(folder: Path, size: tuple[int, int] | None = None) -> Source:
    """Read every image below `folder` into memory.

    Args:
        folder: class folders, or `train` (and perhaps `val`, `test`) with class folders in each.
        size: height and width to bring the images to; None when they all share one size.

    Raises:
        DataError: names the folder or image that is missing, empty, unreadable or of another size.
    """
    if not folder.is_dir():
        raise DataError(f"data set folder:{folder}: no such folder")
    parted = (folder / "train").is_dir()
    roots = {part: folder / part for part in PARTS} if parted else {"train": folder}
    files = {part: _class_files(root) for part, root in roots.items() if root.is_dir()}
    classes = tuple(files["train"])
    for part, found in files.items():
        unknown = sorted(found.keys() - files["train"].keys())
        if unknown:
            raise DataError(f"{roots[part] / unknown[0]}: a class that {roots['train']} lacks")
    every = [path for found in files.values() for paths in found.values() for path in paths]
    preprocessing = _preprocessing(folder, every, size)
    if len(every) * int(np.prod(preprocessing.shape)) > _MEMORY:
        raise DataError(
            f"data set folder:{folder}: {len(every):,} images of"
            f" {'x'.join(map(str, preprocessing.shape))} do not fit in {_MEMORY >> 30} GiB;"
            " choose a smaller --image-size"
        )
    sets = {part: _read(found, classes, preprocessing) for part, found in files.items()}
    return Source(
        train=sets["train"],
        validation=sets.get("val"),
        test=sets.get("test"),
        classes=classes,
        preprocessing=preprocessing,
    )


def _class_files(root: Path) -> dict[str, list[Path]]:
    """Image files by class, both in alphabetical order."""
    found: dict[str, list[Path]] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if folder.name.startswith("."):
            continue
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise DataError(f"{folder}: a class folder without images; fill it or take it away")
        found[folder.name] = paths
    if not found:
        raise DataError(f"{root}: no class folders in it; put the images of each class in one")
    return found


def _preprocessing(
    folder: Path, files: Sequence[Path], size: tuple[int, int] | None
) -> Preprocessing:
    """Grey when every image is, else RGB; the size given, or the one that all images share."""
    from PIL import Image, UnidentifiedImageError

    sizes: Counter[tuple[int, int]] = Counter()
    grey = True
    for path in files:
        try:
            with Image.open(path) as image:  # the header alone
                sizes[image.height, image.width] += 1
                grey = grey and image.mode in _GREY_MODES
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{path}: cannot be read as an image: {error}") from None
        except Image.DecompressionBombError:
            raise DataError(f"{path}: too many pixels; scale it down or take it away") from None
    if size is None and len(sizes) > 1:
        (common, _), *_ = sizes.most_common(1)
        raise DataError(
            f"data set folder:{folder}: images of {len(sizes)} sizes (most are"
            f" {common[0]}x{common[1]}); say which one to bring them to with --image-size"
        )
    chosen = size or next(iter(sizes))
    return Preprocessing(resize=chosen, crop=chosen, color="grey" if grey else "rgb")


def _read(
    files: dict[str, list[Path]], classes: Sequence[str], preprocessing: Preprocessing
) -> ImageSet:
    numbered = [(classes.index(name), path) for name, paths in files.items() for path in paths]
    images = np.empty((len(numbered), *preprocessing.shape), dtype=np.uint8)
    for index, (_, path) in enumerate(numbered):
        images[index] = preprocessing.read(path)
    labels = torch.tensor([label for label, _ in numbered], dtype=torch.int64)
    return ImageSet(torch.from_numpy(images), labels)
