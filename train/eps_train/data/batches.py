"""The batches of an epoch, augmented, from memory or from disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eps_train.config import TrainingConfig
from eps_train.data import augment
from eps_train.data.augment import (
    EpochOrder,
    like_images,
    shift_and_flip,
    step_seeds,
    step_uniform,
)
from eps_train.data.dataset import Data, DataIdentity
from eps_train.data.images import FileSet, ImageSet, Part, load
from eps_train.data.mixing import Mixing, erase, trivially_augmented

_ORDER = augment.CHANGES  # numbers whose ranks are the order of the color changes
_NUMBERS = {  # uniform random numbers per image
    "shift": 0,
    "trivial": 0,
    "svhn": augment.NUMBERS,
    "imagenet": augment.CROP_NUMBERS + augment.COLOR_NUMBERS + _ORDER,
}

_TRIVIAL, _ERASING, _MIXING = 1, 2, 3  # streams of random numbers beside those

Share = Callable[[int], slice]
"""From the number of images in a batch to those among them that are this process's."""


def make(data: Data, config: TrainingConfig, device: torch.device, share: Share = slice) -> Batches:
    """The batches of `data.train`, from memory or from disk.

    Args:
        data: the data set, loaded with the normalization that `config` names.
        config: batch size, seed and augmentation.
        device: where the batches go, and where they are augmented.
        share: from the number of images in a batch to those that are this process's; all by
            default. What it raises is passed on.
    """
    as_configured = ("pretrained", data.identity.normalization)
    assert config.normalization in as_configured, "load the data as config says"
    if config.augmentation == "trivial" or isinstance(data.train, FileSet):
        return LoaderBatches(data.train, config, data.identity, device, share)
    assert isinstance(data.train, ImageSet)
    return DeviceBatches(data.train, config, data.identity, device, share)


class Batches(ABC):
    """The training part, batch by batch, on the device, augmented, as raw pixels.

    They are uint8 with labels int64, unless mixed (:class:`~eps_train.data.mixing.Mixing`).

    Every random choice follows from (seed, epoch) alone, so that an epoch can be entered in its
    middle and goes on exactly as if it had not been left.

    Attributes:
        count: images in the training part.
        size: images per batch, over all processes. Every batch is full, because batch norm depends
            on the batch size; the images of a last incomplete batch are left out.
        steps: batches per epoch.
        share: this process's images of a batch.
        mean: of the training images, per channel.
        mixing: of each batch, if any.
    """

    def __init__(
        self,
        images: Part,
        config: TrainingConfig,
        identity: DataIdentity,
        device: torch.device,
        share: Share,
    ) -> None:
        self.mean = torch.tensor(identity.mean).view(len(identity.mean), -1).mean(dim=1).tolist()
        mixed = config.mixup or config.cutmix
        self.mixing = Mixing(config, len(identity.classes)) if mixed else None
        self.count, self.config, self.device = len(images), config, device
        self.size = min(config.batch_size, self.count)
        self.steps = self.count // self.size
        self.share = share(self.size)

    @abstractmethod
    def epoch(self, epoch: int, *, first: int) -> Iterator[ImageSet]:
        """This process's share of the batches of an epoch, from step `first` on (both 0-based).

        Raises DataError that names a file that cannot be read.
        """


class DeviceBatches(Batches):
    """Batches of a set that fits in memory: it is on the device as a whole.

    On a GPU with too little free memory for it, it stays in the host's memory.
    """

    def __init__(
        self,
        images: ImageSet,
        config: TrainingConfig,
        identity: DataIdentity,
        device: torch.device,
        share: Share,
    ) -> None:
        super().__init__(images, config, identity, device, share)
        room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else None
        fits = room is None or images.images.nbytes <= room
        self._images = images.to(device) if fits else images

    def epoch(self, epoch: int, *, first: int) -> Iterator[ImageSet]:
        sampler = EpochSampler(self, epoch)
        order = sampler.order.to(self._images.labels.device)
        for step in range(first, self.steps):
            batch = self._images[order[sampler.rows(step)]].to(self.device)
            yield sampler.augmented(batch, step)


class LoaderBatches(Batches):
    """Batches that worker processes read, and crop or augment; the device does the rest.

    Images that are in memory are augmented in worker processes where a GPU would wait for them, and
    in this process otherwise.
    """

    def __init__(
        self,
        images: Part,
        config: TrainingConfig,
        identity: DataIdentity,
        device: torch.device,
        share: Share,
    ) -> None:
        super().__init__(images, config, identity, device, share)
        self._read = _Reader(images, config.augmentation)
        here = isinstance(images, ImageSet) and device.type == "cpu"
        self._workers = 0 if here else None

    def epoch(self, epoch: int, *, first: int) -> Iterator[ImageSet]:
        sampler = EpochSampler(self, epoch)
        steps = range(first, self.steps)
        # As arrays: tensors would be sent to the workers through shared memory.
        requests = (
            (
                sampler.order[sampler.rows(step)].numpy(),
                sampler.crop_uniform(step).numpy(),
                sampler.seeds(step, _TRIVIAL),
            )
            for step in steps
        )
        answers = load(self._read, requests, pin=self.device.type == "cuda", workers=self._workers)
        for step, (pixels, labels) in zip(steps, answers, strict=True):
            batch = ImageSet(
                pixels.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
            yield sampler.augmented(batch, step, cropped=True)


class EpochSampler:
    """Which images make up the batches of one epoch, and how each is augmented.

    Attributes:
        order: permutation of the training images, int64 `[N]`, on the CPU.
    """

    def __init__(self, batches: Batches, epoch: int) -> None:
        config = batches.config
        self._batches, self._config, self._epoch = batches, config, epoch
        choices = EpochOrder.draw(
            batches.count, seed=config.seed, epoch=epoch, shift=config.shift, flip=config.flip
        )
        self.order = choices.order
        self._shifts = choices.shifts.to(batches.device)
        self._mirrored = choices.mirrored.to(batches.device)

    def rows(self, step: int) -> slice:
        """This process's part of a step's batch, as a slice of the epoch's order."""
        size = self._batches.size
        mine = range(step * size, (step + 1) * size)[self._batches.share]
        return slice(mine.start, mine.stop)

    def crop_uniform(self, step: int) -> Tensor:
        """Random numbers for the crops of this process's images, as `augment.boxes` takes them."""
        return self._uniform(step)[self._batches.share, : augment.CROP_NUMBERS]

    def seeds(self, step: int, stream: int) -> list[int]:
        """Seeds for this process's images of a step, for one of torchvision's transforms."""
        return self._seeds(self._batches.size, step, stream)[self._batches.share]

    def augmented(self, batch: ImageSet, step: int, *, cropped: bool = False) -> ImageSet:
        """This process's images of a step with all that is random: augmented, erased and mixed.

        Args:
            batch: uint8 images on the device, augmented already where `LoaderBatches` does.
            step: of the epoch.
            cropped: as in :meth:`augment`.
        """
        images = self.augment(batch.images, step, cropped=cropped)
        if share := self._config.random_erasing:
            erase(images, self.seeds(step, _ERASING), self._batches.mean, share)
        batch = ImageSet(images, batch.labels)
        if self._batches.mixing is None:
            return batch
        return self._batches.mixing(batch, self._seeds(1, step, _MIXING)[0])

    def augment(self, images: Tensor, step: int, *, cropped: bool) -> Tensor:
        """Augment this process's images of a step, uint8 `[n, C, H, W]` on the device.

        `cropped` images have been cropped by :meth:`crop_uniform` already.
        """
        config, rows = self._config, self.rows(step)
        shifts, mirrored = self._shifts[rows], self._mirrored[rows]
        if config.augmentation in ("shift", "trivial"):
            return shift_and_flip(images, shifts, mirrored, config.shift)
        whole = self._uniform(step)
        uniform = whole[self._batches.share]
        if config.augmentation == "svhn":
            images = augment.distort(images, like_images(uniform, images), shifts, config.shift)
        else:
            if not cropped:
                height, width = images.shape[2:]
                boxes = augment.boxes(height, width, uniform[:, : augment.CROP_NUMBERS])
                images = augment.crop(images, like_images(boxes, images))
            colors = uniform[:, augment.CROP_NUMBERS : -_ORDER]
            order = whole[0, -_ORDER:].argsort()  # of the whole batch, the same in all processes
            images = augment.recolor(images, like_images(colors, images), order)
        return shift_and_flip(images, torch.zeros_like(shifts), mirrored, 0)

    def _uniform(self, step: int) -> Tensor:
        """Uniform random numbers for every image of a step's whole batch, on the CPU."""
        numbers, seed = _NUMBERS[self._config.augmentation], self._config.seed
        return step_uniform(self._batches.size, numbers, seed=seed, epoch=self._epoch, step=step)

    def _seeds(self, count: int, step: int, stream: int) -> list[int]:
        chosen = {"seed": self._config.seed, "epoch": self._epoch, "step": step, "stream": stream}
        seeds: list[int] = step_seeds(count, **chosen).tolist()
        return seeds


@dataclass(frozen=True, slots=True)
class _Reader:
    """Read the images of a batch in a worker: whole, cropped at random or trivially augmented."""

    part: Part
    augmentation: str

    def __call__(
        self, request: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], list[int]]
    ) -> tuple[Tensor, Tensor]:
        chosen, uniform, seeds = request
        crops = None
        if self.augmentation == "imagenet":
            crops = [_Crop(row) for row in torch.from_numpy(uniform).split(1)]
        if isinstance(self.part, FileSet):
            pixels, labels = self.part.read(chosen.tolist(), crops)
        else:
            found = self.part[torch.from_numpy(chosen)]
            pixels, labels = found.images, found.labels
        if self.augmentation == "trivial":
            pixels = trivially_augmented(pixels, seeds)
        return pixels, labels


@dataclass(frozen=True, slots=True)
class _Crop:
    """Choose a box (top, left, height, width) in an image of any size."""

    uniform: Tensor

    def __call__(self, height: int, width: int) -> tuple[int, int, int, int]:
        top, left, rows, columns = augment.boxes(height, width, self.uniform)[0].tolist()
        return top, left, rows, columns
