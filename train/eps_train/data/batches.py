"""Where a training step's images come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from eps_train.config import TrainingConfig
from eps_train.data import augment
from eps_train.data.augment import EpochOrder, shift_and_flip, step_chance, there
from eps_train.data.dataset import Data
from eps_train.data.images import FileSet, ImageSet, load

# -- What chance decides in training: which images make up a batch, and what is done to them

_ORDER = augment.CHANGES  # numbers whose ranks are the order of the changes of colour
_NUMBERS = {
    "shift": 0,
    "svhn": augment.NUMBERS,
    "imagenet": augment.CROP_NUMBERS + augment.COLOR_NUMBERS + _ORDER,
}

Share = Callable[[int], slice]
"""From the number of images in a batch to those among them that are this process's."""


class BatchPlan:
    """The batches of a training part of `count` images.

    Attributes:
        size: images in a batch, those of all processes together.
        steps: batches in an epoch; images that make up no full batch are left out.
        crops: whether images are cropped before all else, which can be done where they are read.
    """

    def __init__(
        self,
        count: int,
        config: TrainingConfig,
        device: torch.device,
        share: Callable[[int], slice],
    ) -> None:
        self.count, self.config, self.device = count, config, device
        self.size = min(config.batch_size, count)
        self.steps = count // self.size
        self.share = share(self.size)
        self.crops = config.augmentation == "imagenet"

    def epoch(self, epoch: int) -> EpochSampler:
        """All of the 0-based `epoch`, from (seed, epoch) alone."""
        return EpochSampler(self, epoch)


class EpochSampler:
    """One epoch of a :class:`BatchPlan`; steps are 0-based.

    Attributes:
        draw: the epoch's order, shifts and mirroring, on the CPU.
    """

    def __init__(self, plan: BatchPlan, epoch: int) -> None:
        config = plan.config
        self._plan, self._epoch = plan, epoch
        self.draw = EpochOrder.draw(
            plan.count, seed=config.seed, epoch=epoch, shift=config.shift, flip=config.flip
        )
        self._placed = self.draw.to(plan.device)

    def rows(self, step: int) -> slice:
        """This process's part of a step's batch, as a slice of the epoch's order."""
        size = self._plan.size
        mine = range(step * size, (step + 1) * size)[self._plan.share]
        return slice(mine.start, mine.stop)

    def crop_chance(self, step: int) -> Tensor:
        """What decides the crops of this process's images, as `augment_imagenet.boxes` takes it."""
        return self._chance(step)[self._plan.share, : augment.CROP_NUMBERS]

    def augmented(self, images: Tensor, step: int, *, cropped: bool = False) -> Tensor:
        """This process's images of a step, uint8 `[n, C, H, W]` on the device, changed at random.

        `cropped` images have had the crop of :meth:`crop_chance` already.
        """
        config, rows = self._plan.config, self.rows(step)
        shifts, mirrored = self._placed.shifts[rows], self._placed.mirrored[rows]
        if config.augmentation == "shift":
            return shift_and_flip(images, shifts, mirrored, config.shift)
        if config.augmentation == "svhn":
            chance = self._chance(step)[self._plan.share]
            images = augment.distort(images, there(chance, images), shifts, config.shift)
        else:
            images = self._imagenet(images, step, cropped=cropped)
        return shift_and_flip(images, torch.zeros_like(shifts), mirrored, 0)

    def _imagenet(self, images: Tensor, step: int, *, cropped: bool) -> Tensor:
        chance = self._chance(step)
        order = chance[0, -_ORDER:].argsort()  # of the whole batch, the same in all processes
        if not cropped:
            height, width = images.shape[2:]
            boxes = augment.boxes(height, width, self.crop_chance(step))
            images = augment.crop(images, there(boxes, images))
        colors = chance[self._plan.share, augment.CROP_NUMBERS : -_ORDER]
        return augment.recolor(images, there(colors, images), order)

    def _chance(self, step: int) -> Tensor:
        """Uniform numbers for every image of a step's whole batch, on the CPU."""
        config = self._plan.config
        numbers = _NUMBERS[config.augmentation]
        return step_chance(self._plan.size, numbers, seed=config.seed, epoch=self._epoch, step=step)


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
        (box,) = augment.boxes(height, width, self.chance[None]).tolist()
        top, left, rows, columns = box
        return top, left, rows, columns


def _has_room(device: torch.device, size: int) -> bool:
    """Whether `size` bytes take no more than half of what a GPU has free."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] // 2
