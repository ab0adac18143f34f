"""Images with labels, held as raw pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
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
    """

    train: ImageSet
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    validation: ImageSet | None = None
    test: ImageSet | None = None

    def resized(self, size: tuple[int, int]) -> Source:
        """All parts brought to `size` (height, width), and the preprocessing that does so."""
        preprocessing = replace(self.preprocessing, resize=size, crop=size)
        return replace(
            self,
            preprocessing=preprocessing,
            train=self.train.through(preprocessing),
            validation=self.validation and self.validation.through(preprocessing),
            test=self.test and self.test.through(preprocessing),
        )
