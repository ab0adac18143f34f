"""Where a training step's images come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from eps_train.augment import EpochOrder, shift_and_flip
from eps_train.config import TrainingConfig
from eps_train.images import ImageSet


class Batches(Protocol):
    """The training part, batch by batch, on the device, augmented, as raw uint8 pixels.

    Every random choice follows from (seed, epoch) alone, so that an epoch can be entered in its
    middle and goes on exactly as if it had not been left.
    """

    @property
    def size(self) -> int:
        """Images in a batch; all batches of an epoch are full: batch norm wants them alike."""

    @property
    def steps(self) -> int:
        """Batches in an epoch."""

    def epoch(self, epoch: int, *, first: int) -> Iterator[ImageSet]:
        """The batches of the 0-based `epoch` from the 0-based step `first` on."""


class DeviceBatches:
    """A set that fits lies on the device as a whole and is augmented there, in batches."""

    def __init__(self, images: ImageSet, config: TrainingConfig, device: torch.device) -> None:
        self._images = images.to(device)
        self._config, self._device = config, device
        self.size = min(config.batch_size, len(images))
        self.steps = len(images) // self.size

    def epoch(self, epoch: int, *, first: int) -> Iterator[ImageSet]:
        config = self._config
        draw = EpochOrder.draw(
            len(self._images),
            seed=config.seed,
            epoch=epoch,
            shift=config.shift,
            flip=config.flip,
        ).to(self._device)
        for step in range(first, self.steps):
            chosen = slice(step * self.size, (step + 1) * self.size)
            batch = self._images[draw.order[chosen]]
            images = shift_and_flip(
                batch.images, draw.shifts[chosen], draw.mirrored[chosen], config.shift
            )
            yield ImageSet(images, batch.labels)
