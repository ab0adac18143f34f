"""Where a training step's images come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from eps_train import augment_imagenet
from eps_train.config import TrainingConfig
from eps_train.data import Data
from eps_train.files import FileSet
from eps_train.images import ImageSet
from eps_train.loading import load
from eps_train.plan import BatchPlan, Share


class Batches(Protocol):
    """The training part, batch by batch, on the device, augmented, as raw uint8 pixels.

    Every random choice follows from (seed, epoch) alone, so that an epoch can be entered in its
    middle and goes on exactly as if it had not been left.
    """

    @property
    def size(self) -> int:
        """Images in a batch, those of all processes together.

        All batches of an epoch are full: batch norm wants them alike.
        """

    @property
    def steps(self) -> int:
        """Batches in an epoch."""

    def epoch(self, epoch: int, *, first: int) -> Iterator[ImageSet]:
        """The batches of the 0-based `epoch` from the 0-based step `first` on.

        Of each batch this process's share. Raises DataError that names a file that cannot be read.
        """


def make(
    data: Data,
    config: TrainingConfig,
    device: torch.device,
    share: Share = slice,
) -> Batches:
    """The batches of `data.train`, from memory or from disk.

    Args:
        data: the whole set, loaded with the normalisation that `config` names.
        config: batch size, seed and augmentation.
        device: where the batches go, and where they are augmented.
        share: from the number of images in a batch to those that are this process's; all if not
            given. What it raises is passed on.
    """
    assert data.identity.normalization == config.normalization, "load the data as config says"
    if isinstance(data.train, FileSet):
        return LoaderBatches(data.train, config, device, share)
    assert isinstance(data.train, ImageSet)
    return DeviceBatches(data.train, config, device, share)


class DeviceBatches:
    """A set that fits lies on the device as a whole and is augmented there, in batches.

    On a GPU that has too little free memory for it, it stays in the computer's own.
    """

    def __init__(
        self,
        images: ImageSet,
        config: TrainingConfig,
        device: torch.device,
        share: Share = slice,
    ) -> None:
        roomy = _has_room(device, images.images.nbytes)
        self._images = images.to(device) if roomy else images
        self._plan = plan = BatchPlan(len(images), config, device, share)
        self.size, self.steps = plan.size, plan.steps

    def epoch(self, epoch: int, *, first: int) -> Iterator[ImageSet]:
        plan = self._plan.epoch(epoch)
        order = plan.draw.order.to(self._images.labels.device)
        for step in range(first, self.steps):
            batch = self._images[order[plan.rows(step)]].to(self._plan.device)
            yield ImageSet(plan.augmented(batch.images, step), batch.labels)


class LoaderBatches:
    """A set on disk is read and cropped by worker processes; the device does the rest."""

    def __init__(
        self, files: FileSet, config: TrainingConfig, device: torch.device, share: Share = slice
    ) -> None:
        self._plan = plan = BatchPlan(len(files), config, device, share)
        self.size, self.steps = plan.size, plan.steps
        self._read = _Reader(files, plan.crops)

    def epoch(self, epoch: int, *, first: int) -> Iterator[ImageSet]:
        plan, device = self._plan.epoch(epoch), self._plan.device
        steps = range(first, self.steps)
        wanted = ((plan.draw.order[plan.rows(step)], plan.crop_chance(step)) for step in steps)
        answers = load(self._read, wanted, pin=device.type == "cuda")
        for step, (pixels, labels) in zip(steps, answers, strict=True):
            batch = ImageSet(
                pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            )
            yield ImageSet(plan.augmented(batch.images, step, cropped=True), batch.labels)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the files of a batch: as evaluation does, or of each a random crop, scaled."""

    files: FileSet
    crops: bool

    def __call__(self, wanted: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        chosen, chance = wanted
        how = self.files.preprocessing
        pixels = np.empty((len(chosen), *how.shape), dtype=np.uint8)
        for row, index in enumerate(chosen.tolist()):
            path = self.files.path(index)
            crop = _Crop(chance[row]) if self.crops else None
            pixels[row] = how.read(path) if crop is None else how.read_crop(path, crop)
        return torch.from_numpy(pixels), self.files.labels[chosen]


@dataclass(frozen=True, slots=True)
class _Crop:
    """Chooses a box (top, left, height, width) in a picture of whatever size."""

    chance: Tensor

    def __call__(self, height: int, width: int) -> tuple[int, int, int, int]:
        (box,) = augment_imagenet.boxes(height, width, self.chance[None]).tolist()
        top, left, rows, columns = box
        return top, left, rows, columns


def _has_room(device: torch.device, size: int) -> bool:
    """Whether `size` bytes take no more than half of what a GPU has free."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] // 2
