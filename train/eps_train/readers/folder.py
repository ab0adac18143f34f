"""A folder of images: one subfolder a class, with `train`, `val` and `test` above them or not."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from eps_train.errors import DataError
from eps_train.files import FileSet
from eps_train.images import Source
from eps_train.preprocess import Preprocessing, upright_size
from eps_train.readers.tree import class_files, file_set, folders, in_words, loose_images

_PARTS = {  # what the folders of parts are called in public sets, in whatever case
    "train": ("train", "training", "trn", "seg_train"),
    "val": ("val", "valid", "validation", "dev", "eval", "seg_val"),
    "test": ("test", "testing", "tests", "tst", "seg_test", "holdout"),
}
_PART_OF = {name: part for part, names in _PARTS.items() for name in names}
_GREY_MODES = ("1", "L", "LA")
_SAMPLE = 1_000  # files of a large set that are looked into


def read(
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
