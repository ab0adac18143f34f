"""scikit-learn's digits: 1797 real 8x8 grey scans, in the package itself (UCI, 1998)."""

from __future__ import annotations

import torch

from eps_train.errors import DataError
from eps_train.images import ImageSet, Source
from eps_train.preprocess import Preprocessing


def read() -> Source:
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
