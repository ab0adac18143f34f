"""CIFAR-10, CIFAR-100 and SVHN through torchvision's readers, which check the MD5 sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from eps_train.errors import DataError
from eps_train.images import ImageSet, Source
from eps_train.preprocess import Preprocessing
from eps_train.vision import import_torchvision

_SIZE = (32, 32)
_FILES = {
    "cifar10": "cifar-10-python.tar.gz, unpacked as cifar-10-batches-py",
    "cifar100": "cifar-100-python.tar.gz, unpacked as cifar-100-python",
    "svhn": "train_32x32.mat, extra_32x32.mat and test_32x32.mat",
}


def read(name: str, root: Path, *, download: bool = False) -> Source:
    """Read `cifar10`, `cifar100`, or `svhn` (train and extra mixed, as in the paper)."""
    import_torchvision()
    from torchvision import datasets

    try:
        if name == "svhn":
            pieces = [datasets.SVHN(root, part, download=download) for part in ("train", "extra")]
            train = _join([_image_set(piece.data, piece.labels) for piece in pieces])
            held = datasets.SVHN(root, "test", download=download)
            test, classes = _image_set(held.data, held.labels), [str(digit) for digit in range(10)]
        else:
            reader = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            seen, held = (reader(root, train, download=download) for train in (True, False))
            train, test = (_image_set(_chw(part.data), part.targets) for part in (seen, held))
            classes = list(seen.classes)
    except Exception as error:  # torchvision raises RuntimeError, OSError, pickle's own and more
        raise DataError(
            f"data set {name}: not found whole in {root} ({_first_line(error)}); put"
            f" {_FILES[name]} there, name its folder with --data-root, or add --download"
        ) from None
    return Source(
        train=train,
        test=test,
        classes=tuple(classes),
        preprocessing=Preprocessing(resize=_SIZE, crop=_SIZE, color="rgb"),
    )


def _chw(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _image_set(pixels: np.ndarray[Any, Any], labels: Any) -> ImageSet:
    return ImageSet(torch.from_numpy(pixels), torch.as_tensor(np.asarray(labels)).to(torch.int64))


def _join(sets: list[ImageSet]) -> ImageSet:
    return ImageSet(torch.cat([s.images for s in sets]), torch.cat([s.labels for s in sets]))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
