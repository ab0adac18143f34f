"""Data sets that can be downloaded: digits, CIFAR, SVHN, MNIST and Fashion-MNIST."""

from __future__ import annotations

import contextlib
import gzip
import sys
import zlib
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eps_core.errors import DataError
from eps_core.preprocessing import Preprocessing
from eps_train.data.images import ImageSet, RawDataset

_DIGITS = tuple("0123456789")

# -- scikit-learn's digits: 1797 real 8x8 grey scans, in the package itself (UCI, 1998)


def read_digits() -> RawDataset:
    """The digits of scikit-learn, scaled to 0..255."""
    package = find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise DataError(
            "data set digits: scikit-learn is not installed; pip install 'eps-resnet[train]'"
        )
    # The file that `sklearn.datasets.load_digits` reads; importing the package takes seconds.
    file = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    table = torch.from_numpy(np.loadtxt(file, delimiter=","))
    pixels, labels = table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1]  # 0..16, 0..9
    return RawDataset(
        train=ImageSet((pixels * (255 / 16)).round().to(torch.uint8), labels.to(torch.int64)),
        classes=_DIGITS,
        preprocessing=Preprocessing(resize=(8, 8), crop=(8, 8), color="grey"),
    )


# -- torchvision, which knows where data sets are published, and their checksums


def import_torchvision() -> None:
    """Make `import torchvision` work in this process, or raise what it raises.

    Package indexes serve torchvision's CUDA build beside torch's CPU build. That pair fails on
    import, because torchvision describes two operators that its compiled library would have
    registered. Its networks and data sets use neither, so it is enough to declare them.
    """
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error) or hasattr(torch.ops.torchvision, "nms"):
            raise
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # left behind by the failed import
        import_module("torchvision")


@contextlib.contextmanager
def _torchvision(name: str, root: Path, files: str, *, download: bool) -> Iterator[Any]:
    """Lend `torchvision.datasets`, to read or `download` a data set in the block.

    Whatever is raised there becomes a DataError that says which `files` to put into `root`.
    """
    try:
        import_torchvision()
        from torchvision import datasets

        with contextlib.redirect_stdout(sys.stderr):  # --json prints nothing else on stdout
            yield datasets
    except Exception as error:  # torchvision raises RuntimeError, OSError, pickle's own and more
        # Where torchvision tried several mirrors, the last line is of the last of them. It goes on
        # with advice for those who call it from Python.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        last = lines[-1] if lines else type(error).__name__
        reason = last.partition(" You can use download=True")[0].strip("<>").rstrip(".")
        raise DataError(
            f"data set {name}: cannot be downloaded into {root} ({reason}); put {files} there"
            if download
            else f"data set {name}: not found whole in {root} ({reason}); put {files} there, name"
            " its folder with --data-root, or have eps-train --download fetch them"
        ) from None


# -- CIFAR-10, CIFAR-100 and SVHN in the files that torchvision reads

_FILES = {
    "cifar10": "cifar-10-python.tar.gz (unpacked: the folder cifar-10-batches-py)",
    "cifar100": "cifar-100-python.tar.gz (unpacked: the folder cifar-100-python)",
    "svhn": "train_32x32.mat, extra_32x32.mat and test_32x32.mat",
}


def read_archive(name: str, root: Path, *, download: bool = False) -> RawDataset:
    """Read `cifar10`, `cifar100`, or `svhn` (train and extra mixed, as in the paper).

    torchvision checks the MD5 sums. Raises DataError that says which files to put where.
    """

    with _torchvision(name, root, _FILES[name], download=download) as datasets:
        if name == "svhn":
            first, extra, last = (
                datasets.SVHN(root, part, download=download) for part in ("train", "extra", "test")
            )
            pixels = np.concatenate([first.data, extra.data])
            train = _image_set(pixels, np.concatenate([first.labels, extra.labels]))
            test, classes = _image_set(last.data, last.labels), _DIGITS
        else:
            reader = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            cifar = [reader(root, train, download=download) for train in (True, False)]
            train, test = (_image_set(c.data.transpose(0, 3, 1, 2), c.targets) for c in cifar)
            classes = tuple(cifar[0].classes)
    return RawDataset(
        train=train,
        test=test,
        classes=classes,
        preprocessing=Preprocessing(resize=(32, 32), crop=(32, 32), color="rgb"),
    )


def _image_set(pixels: np.ndarray[Any, Any], labels: Any) -> ImageSet:
    """From arrays `[N, C, H, W]` and `[N]` as torchvision holds them."""
    images = torch.from_numpy(np.ascontiguousarray(pixels))
    return ImageSet(images, torch.as_tensor(np.asarray(labels)).to(torch.int64))


# -- MNIST and Fashion-MNIST in their own format, IDX (LeCun, "The MNIST database")
#
# Not through torchvision: packages of the same files (Debian's dataset-fashion-mnist) compress them
# again, so that their MD5 sums differ. Checked are gzip's own CRC, and that shape and length agree.

_IMAGES, _LABELS = 3, 1  # dimensions, the last byte of the magic number
_STEMS = tuple(
    f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
)

_FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}  # torchvision's names
_CLASSES = {
    "mnist": _DIGITS,
    "fashion-mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}


def read_idx(name: str, root: Path, *, download: bool = False) -> RawDataset:
    """Read `mnist` or `fashion-mnist` below `root`: 60,000 training and 10,000 test images.

    Looks in `root` itself and where torchvision and others put the files; `download` fetches all of
    them when one is missing. Raises DataError that names the file that is missing or damaged.
    """
    if download and None in [_find(name, root, stem) for stem in _STEMS]:
        files = ", ".join(f"{stem}.gz" for stem in _STEMS)
        with _torchvision(name, root, files, download=True) as datasets:
            (datasets.MNIST if name == "mnist" else datasets.FashionMNIST)(root, download=True)
    train, test = (
        ImageSet(
            _array(name, root, f"{part}-images-idx3-ubyte", _IMAGES)[:, None],
            _array(name, root, f"{part}-labels-idx1-ubyte", _LABELS).to(torch.int64),
        )
        for part in ("train", "t10k")
    )
    size = (int(train.images.shape[2]), int(train.images.shape[3]))
    return RawDataset(
        train=train,
        test=test,
        classes=_CLASSES[name],
        preprocessing=Preprocessing(resize=size, crop=size, color="grey"),
    )


def _array(name: str, root: Path, stem: str, dimensions: int) -> Tensor:
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
    paths = (folder / file for folder in folders for file in (f"{stem}.gz", stem))
    return next(filter(Path.is_file, paths), None)
