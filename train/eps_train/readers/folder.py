"""A folder of images: one subfolder a class, with `train`, `val` and `test` above them or not."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from eps_train import images
from eps_train.errors import DataError
from eps_train.files import FileSet
from eps_train.images import ImageSet, Part, Source
from eps_train.preprocess import Preprocessing
from eps_train.readers.tree import class_files, file_set

PARTS = ("train", "val", "test")
_MISNAMED = {"valid": "val", "validation": "val", "dev": "val", "testing": "test"}
_GREY_MODES = ("1", "L", "LA", "I", "F")
_SAMPLE = 1_000  # files of a large set that are looked into


def read(folder: Path, size: tuple[int, int] | None = None) -> Source:
    """Find every image below `folder`; read them into memory unless they are too many.

    What is too large to be held stays on disk, as `files.FileSet`. Whether that is grey or coloured
    is told by 1,000 of its images, the same every time.

    Args:
        folder: class folders, or `train` (and perhaps `val`, `test`) with class folders in each.
        size: height and width to bring the images to; None when they all share one size.

    Raises:
        DataError: names the folder or image that is missing, empty, unreadable or of another size.
    """
    if not folder.is_dir():
        raise DataError(f"data set folder:{folder}: no such folder")
    found = {part: class_files(root) for part, root in _roots(folder).items()}
    classes = tuple(found["train"])
    paths = [
        _roots(folder)[part] / name
        for part, by_class in found.items()
        for names in by_class.values()
        for name in names
    ]
    preprocessing, held = _preprocessing(folder, paths, size)
    parts: dict[str, Part] = {}
    for part, root in _roots(folder).items():
        files = file_set(root, found[part], classes, preprocessing)
        parts[part] = _in_memory(files) if held else files
    return Source(
        train=parts["train"],
        validation=parts.get("val"),
        test=parts.get("test"),
        classes=classes,
        preprocessing=preprocessing,
    )


def _roots(folder: Path) -> dict[str, Path]:
    """Where the class folders of each part lie; all of them are training data without `train`."""
    there = {part: folder / part for part in PARTS if (folder / part).is_dir()}
    if "train" in there:
        for wrong, right in _MISNAMED.items():
            if (folder / wrong).is_dir() and right not in there:
                raise DataError(
                    f"{folder / wrong}: is not looked into beside train; name it {right}"
                )
        return there
    if there:
        root, *_ = there.values()
        raise DataError(
            f"{root}: a part without {folder / 'train'}; add that, or put all class folders"
            f" directly into {folder}"
        )
    return {"train": folder}


def _in_memory(files: FileSet) -> ImageSet:
    return ImageSet(files.images, files.labels)


def _preprocessing(
    folder: Path, paths: Sequence[Path], size: tuple[int, int] | None
) -> tuple[Preprocessing, bool]:
    """How the files are to be read, and whether they can be held in memory then.

    Grey when every image is, else RGB; the size given, or the one that all images share.
    """
    every = None if size else _look(paths)
    if every is not None:
        size = _common_size(folder, every[0])
    assert size is not None
    few = random.Random(0).sample(paths, min(len(paths), _SAMPLE))
    how = _how(size, grey=_look(few)[1])
    if _fits(paths, how):
        how = _how(size, grey=(every or _look(paths))[1])
    return how, _fits(paths, how)


def _how(size: tuple[int, int], *, grey: bool) -> Preprocessing:
    return Preprocessing(resize=size, crop=size, color="grey" if grey else "rgb")


def _fits(paths: Sequence[Path], how: Preprocessing) -> bool:
    return len(paths) * math.prod(how.shape) <= images.MEMORY


def _common_size(folder: Path, sizes: Counter[tuple[int, int]]) -> tuple[int, int]:
    (common, _), *others = sizes.most_common()
    if others:
        raise DataError(
            f"data set folder:{folder}: images of {len(sizes)} sizes (most are"
            f" {common[0]}x{common[1]}); say which one to bring them to with --image-size"
        )
    return common


def _look(paths: Sequence[Path]) -> tuple[Counter[tuple[int, int]], bool]:
    """Sizes (height, width) of images, and whether all are grey; from their headers alone."""
    from PIL import Image, UnidentifiedImageError

    sizes: Counter[tuple[int, int]] = Counter()
    grey = True
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes[image.height, image.width] += 1
                grey = grey and (image.mode in _GREY_MODES or image.mode.startswith("I;16"))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{path}: cannot be read as an image: {error}") from None
        except Image.DecompressionBombError:
            raise DataError(f"{path}: too many pixels; scale it down or take it away") from None
    return sizes, grey
