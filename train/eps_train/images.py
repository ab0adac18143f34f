"""Images with labels, held as raw pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eps_train.preprocess import Preprocessing


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images uint8 `[N, C, H, W]` with labels int64 `[N]`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> ImageSet:
        return ImageSet(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a reader found, before it is split.

    Attributes:
        train: images to train on, or all images when there are no other parts.
        validation, test: parts that the source itself keeps apart; None: to be split off.
        classes: label names by index.
        preprocessing: from an image file to the same pixels.
    """

    train: ImageSet
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    validation: ImageSet | None = None
    test: ImageSet | None = None
