"""Images with labels: held as raw pixels, or to be read from their files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from eps_train.preprocess import Preprocessing

MEMORY = 8 << 30  # bytes of pixels that were held at most by runs that do not say what they held


class Part(Protocol):
    """A part of a data set, in memory (:class:`ImageSet`) or on disk (`files.FileSet`)."""

    @property
    def images(self) -> Tensor:
        """All of them, uint8 `[N, C, H, W]`; of a part on disk, read now, every time."""

    @property
    def labels(self) -> Tensor:
        """Int64 `[N]`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Part:
        """The images at an int64 `[M]` index."""

    def to(self, device: torch.device) -> Part:
        """The same, with :meth:`batches` on `device`."""

    def batches(self, size: int) -> Iterator[ImageSet]:
        """In order, `size` at a time; the last batch may be smaller."""

    def update(self, digest: hashlib._Hash) -> None:
        """Add to `digest` what makes this part the one it is."""


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

    def batches(self, size: int) -> Iterator[ImageSet]:
        return map(ImageSet, self.images.split(size), self.labels.split(size))

    def update(self, digest: hashlib._Hash) -> None:
        """Shape, every pixel, every label."""
        digest.update(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)

    def through(self, preprocessing: Preprocessing) -> ImageSet:
        """The same images as `preprocessing` brings a file that holds one of them to the network.

        So what a run is trained on and what `eps-predict` makes of the original picture are alike.
        """
        from PIL import Image

        pixels = np.empty((len(self), *preprocessing.shape), dtype=np.uint8)
        for index, image in enumerate(self.images.permute(0, 2, 3, 1).numpy()):
            pixels[index] = preprocessing.apply(
                Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            )
        return ImageSet(torch.from_numpy(pixels), self.labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a reader found, before it is split.

    Attributes:
        train: images to train on, or all images when there are no other parts.
        validation, test: parts that the source itself keeps apart; None: to be split off.
        classes: label names by index.
        preprocessing: from an image file to the same pixels.
        folder: that the files lie in; None where they are no images that one could look at.
        held: whether parts that consist of files are to be read into memory once they are split.
        left_out: what lies in the folder and is not used, in words.
        skipped: files that were there, damaged, and are not used, below `folder`.
    """

    train: Part
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    validation: Part | None = None
    test: Part | None = None
    folder: Path | None = None
    held: bool = False
    left_out: str = ""
    skipped: tuple[str, ...] = ()

    def resized(self, size: tuple[int, int]) -> Source:
        """All parts, which lie in memory, brought to `size` (height, width)."""
        preprocessing = replace(self.preprocessing, resize=size, crop=size)

        def through(part: Part) -> ImageSet:
            assert isinstance(part, ImageSet)
            return part.through(preprocessing)

        return replace(
            self,
            preprocessing=preprocessing,
            train=through(self.train),
            validation=self.validation and through(self.validation),
            test=self.test and through(self.test),
        )
