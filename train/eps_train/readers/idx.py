"""MNIST and Fashion-MNIST in their own format, IDX (LeCun, "The MNIST database"), or gzipped.

The files are looked for in the data root itself and where torchvision puts them. Whoever packs
them again (Debian does, as dataset-fashion-mnist) changes their published MD5 sums, so what is
checked is gzip's own CRC, and that shape and length agree.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eps_train.errors import DataError
from eps_train.images import ImageSet, Source
from eps_train.preprocess import Preprocessing
from eps_train.readers.fetch import fetched

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


def read(name: str, root: Path, *, download: bool = False) -> Source:
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
