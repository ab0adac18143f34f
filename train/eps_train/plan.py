"""What chance decides in training: which images make up a batch, and what is done to them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eps_train import augment_imagenet, augment_svhn
from eps_train.augment import EpochOrder, shift_and_flip, step_chance, there
from eps_train.config import TrainingConfig

_ORDER = augment_imagenet.CHANGES  # numbers whose ranks are the order of the changes of colour
_NUMBERS = {
    "shift": 0,
    "svhn": augment_svhn.NUMBERS,
    "imagenet": augment_imagenet.CROP_NUMBERS + augment_imagenet.COLOR_NUMBERS + _ORDER,
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

    def epoch(self, epoch: int) -> EpochPlan:
        """All of the 0-based `epoch`, from (seed, epoch) alone."""
        return EpochPlan(self, epoch)


class EpochPlan:
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
        return self._chance(step)[self._plan.share, : augment_imagenet.CROP_NUMBERS]

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
            images = augment_svhn.distort(images, there(chance, images), shifts, config.shift)
        else:
            images = self._imagenet(images, step, cropped=cropped)
        return shift_and_flip(images, torch.zeros_like(shifts), mirrored, 0)

    def _imagenet(self, images: Tensor, step: int, *, cropped: bool) -> Tensor:
        chance = self._chance(step)
        order = chance[0, -_ORDER:].argsort()  # of the whole batch, the same in all processes
        if not cropped:
            height, width = images.shape[2:]
            boxes = augment_imagenet.boxes(height, width, self.crop_chance(step))
            images = augment_imagenet.crop(images, there(boxes, images))
        colors = chance[self._plan.share, augment_imagenet.CROP_NUMBERS : -_ORDER]
        return augment_imagenet.recolor(images, there(colors, images), order)

    def _chance(self, step: int) -> Tensor:
        """Uniform numbers for every image of a step's whole batch, on the CPU."""
        config = self._plan.config
        numbers = _NUMBERS[config.augmentation]
        return step_chance(self._plan.size, numbers, seed=config.seed, epoch=self._epoch, step=step)
