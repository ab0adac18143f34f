"""CIFAR-10, CIFAR-100 and SVHN through torchvision's readers, which check the MD5 sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from eps_train.images import ImageSet, Source
from eps_train.preprocess import Preprocessing
from eps_train.readers.fetch import fetched

_SIZE = (32, 32)
_FILES = {
    "cifar10": "cifar-10-python.tar.gz (unpacked: the folder cifar-10-batches-py)",
    "cifar100": "cifar-100-python.tar.gz (unpacked: the folder cifar-100-python)",
    "svhn": "train_32x32.mat, extra_32x32.mat and test_32x32.mat",
}


def read(name: str, root: Path, *, download: bool = False) -> Source:
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
