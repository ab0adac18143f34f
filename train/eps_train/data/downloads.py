"""CIFAR-10, CIFAR-100 and SVHN through torchvision's readers, which check the MD5 sums."""

from __future__ import annotations

import contextlib
import gzip
import sys
import zlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from eps_core.errors import DataError
from eps_core.preprocessing import Preprocessing
from eps_train.data.images import ImageSet, Source

# -- scikit-learn's digits: 1797 real 8x8 grey scans, in the package itself (UCI, 1998)


def read_digits() -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "data set digits: scikit-learn is not installed; pip install 'eps-resnet[train]'"
        ) from None
    digits = load_digits()
    pixels = torch.from_numpy(digits.images)  # 0..16
    images = (pixels * (255 / 16)).round().to(torch.uint8)[:, None]
    return Source(
        train=ImageSet(images, torch.from_numpy(digits.target).to(torch.int64)),
        classes=tuple(str(digit) for digit in range(10)),
        preprocessing=Preprocessing(resize=(8, 8), crop=(8, 8), color="grey"),
    )


# -- torchvision, also where its compiled part cannot be loaded
#
# A torchvision that was built for another torch (a CUDA build beside a torch without CUDA, which
# is what a package index may serve together) fails on import: it describes two operators that its
# library would have brought. Its networks and readers need neither, so they are declared here.

_SIGN = "operator torchvision::"
_declared: list[torch.library.Library] = []  # a declaration lasts as long as its library


def import_torchvision() -> None:
    """Have `import torchvision` work in this process from here on.

    Raises what the import raises when that is something else: not installed, or broken.
    """
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if _declared or _SIGN not in str(error):
            raise
        _declare_operators()
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import left behind
        import_module("torchvision")


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)


# -- Fetching a data set's files with torchvision, which knows where they are and checks them

T = TypeVar("T")


def fetched(name: str, root: Path, files: str, work: Callable[[], T], *, download: bool) -> T:
    """What `work` returns, a torchvision reader's doing; torchvision can be imported in it.

    Args:
        name: the data set.
        root: where its files belong.
        files: the files, as a message is to name them.
        work: reads them, and fetches them first where that was asked for.
        download: whether it was.

    Raises:
        DataError: says which files to put where.
    """
    import_torchvision()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where --json prints nothing of its own
            return work()
    except Exception as error:  # torchvision raises RuntimeError, OSError, pickle's own and more
        reason = _last_line(error)
    if download:
        raise DataError(
            f"data set {name}: cannot be fetched into {root} ({reason}); put {files} there by hand"
        )
    raise DataError(
        f"data set {name}: not found whole in {root} ({reason}); put {files} there, name its folder"
        " with --data-root, or have eps-train --download fetch them"
    )


def _last_line(error: Exception) -> str:
    """What is wrong; where torchvision tried several mirrors, what the last of them said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # It goes on with an advice to those who call it from Python.
    return lines[-1].partition(" You can use download=True")[0].strip("<>").rstrip(".")


_SIZE = (32, 32)
_FILES = {
    "cifar10": "cifar-10-python.tar.gz (unpacked: the folder cifar-10-batches-py)",
    "cifar100": "cifar-100-python.tar.gz (unpacked: the folder cifar-100-python)",
    "svhn": "train_32x32.mat, extra_32x32.mat and test_32x32.mat",
}


def read_archive(name: str, root: Path, *, download: bool = False) -> Source:
    """Read `cifar10`, `cifar100`, or `svhn` (train and extra mixed, as in the paper).

    Raises DataError that says which files to put where.
    """
    train, test, classes = fetched(
        name, root, _FILES[name], lambda: _parts(name, root, download), download=download
    )
    return Source(
        train=train,
        test=test,
        classes=tuple(classes),
        preprocessing=Preprocessing(resize=_SIZE, crop=_SIZE, color="rgb"),
    )


def _parts(name: str, root: Path, download: bool) -> tuple[ImageSet, ImageSet, list[str]]:
    """Training part, test part and label names."""
    from torchvision import datasets

    if name == "svhn":
        parts = [datasets.SVHN(root, p, download=download) for p in ("train", "extra", "test")]
        *seen, test = (_image_set(part.data, part.labels) for part in parts)
        return _join(seen), test, [str(digit) for digit in range(10)]
    reader = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    both = [reader(root, train, download=download) for train in (True, False)]
    train, test = (_image_set(_chw(part.data), part.targets) for part in both)
    return train, test, list(both[0].classes)


def _chw(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _image_set(pixels: np.ndarray[Any, Any], labels: Any) -> ImageSet:
    return ImageSet(torch.from_numpy(pixels), torch.as_tensor(np.asarray(labels)).to(torch.int64))


def _join(sets: list[ImageSet]) -> ImageSet:
    return ImageSet(torch.cat([s.images for s in sets]), torch.cat([s.labels for s in sets]))


# -- MNIST and Fashion-MNIST in their own format, IDX (LeCun, "The MNIST database"), or gzipped
#
# The files are looked for in the data root itself and where torchvision puts them. Whoever packs
# them again (Debian does, as dataset-fashion-mnist) changes their published MD5 sums, so what is
# checked is gzip's own CRC, and that shape and length agree.

_IMAGES, _LABELS = 3, 1  # dimensions, the last byte of the magic number
_STEMS = tuple(
    f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
)

_FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}  # torchvision's names
_CLASSES = {
    "mnist": tuple(str(digit) for digit in range(10)),
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}


def read_idx(name: str, root: Path, *, download: bool = False) -> Source:
    """Read `mnist` or `fashion-mnist` below `root`: 60,000 training and 10,000 test images.

    Raises DataError that names the file that is missing or damaged; `download` fetches them all
    when one of them is missing.
    """
    if download and None in [_find(name, root, stem) for stem in _STEMS]:
        _fetch(name, root)
    train, test = (
        ImageSet(
            _array(name, root, f"{part}-images-idx3-ubyte", _IMAGES)[:, None],
            _array(name, root, f"{part}-labels-idx1-ubyte", _LABELS).to(torch.int64),
        )
        for part in ("train", "t10k")
    )
    size = (int(train.images.shape[2]), int(train.images.shape[3]))
    return Source(
        train=train,
        test=test,
        classes=_CLASSES[name],
        preprocessing=Preprocessing(resize=size, crop=size, color="grey"),
    )


def _array(name: str, root: Path, stem: str, dimensions: int) -> Tensor:
    """The uint8 array of one IDX file."""
    path = _find(name, root, stem)
    if path is None:
        raise DataError(
            f"data set {name}: no {stem}.gz in {root} (nor in {_FOLDERS[name]}/raw or {name} below"
            " it); put the four original files there, name their folder with --data-root, or have"
            " eps-train --download fetch them"
        )
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be unpacked: {error}") from None
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path}: not an IDX file of bytes in {dimensions} dimensions")
    shape = np.frombuffer(content, ">u4", dimensions, 4).astype(np.int64)
    if len(content) != header + int(shape.prod()):
        raise DataError(f"{path}: {len(content)} bytes do not fit its shape {shape.tolist()}")
    pixels = np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    return torch.from_numpy(pixels.copy())


def _find(name: str, root: Path, stem: str) -> Path | None:
    folders = (root, root / _FOLDERS[name] / "raw", root / name)
    for folder in folders:
        for path in (folder / f"{stem}.gz", folder / stem):
            if path.is_file():
                return path
    return None


def _fetch(name: str, root: Path) -> None:
    def work() -> None:
        from torchvision import datasets

        reader = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
        reader(root, download=True)

    files = ", ".join(f"{stem}.gz" for stem in _STEMS)
    fetched(name, root, files, work, download=True)
