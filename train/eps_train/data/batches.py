"""The batches of an epoch, augmented, from memory or from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eps_train.config import TrainingConfig
from eps_train.data import augment
from eps_train.data.augment import like_images, shift_and_flip
from eps_train.data.dataset import Data
from eps_train.data.images import FileSet, ImageSet, Part, load

_ORDER = augment.CHANGES  # numbers whose ranks are the order of the color changes
_NUMBERS = {  # uniform random numbers per image
    "shift": 0,
    "trivial": 0,
    "svhn": augment.NUMBERS,
    "imagenet": augment.CROP_NUMBERS + augment.COLOR_NUMBERS + _ORDER,
}

_TRIVIAL, _ERASING, _MIXING = 1, 2, 3  # streams of random numbers beside those


class Batches:
    """The training part, batch by batch, on the device, augmented, as raw pixels.

    They are uint8 with labels int64, unless mixed (:func:`~eps_train.data.augment.mix`).

    Every random choice follows from (seed, epoch) alone, so that an epoch can be entered in its
    middle and goes on exactly as if it had not been left.

    Images on disk are read by worker processes, which also choose the crops of ImageNet. Those in
    memory are on the device as a whole; on a GPU with too little free memory for it they stay in
    the host's. For TrivialAugment they go to worker processes where a GPU would wait for it, and
    are augmented in this process otherwise.

    Args:
        data: the data set, loaded with the normalization that `config` names.
        config: batch size, seed and augmentation.
        device: where the batches go, and where they are augmented.
        share: from the number of images in a batch to those that are this process's; all by
            default. What it raises is passed on.

    Attributes:
        size: images per batch, over all processes. Every batch is full, because batch norm depends
            on the batch size; the images of a last incomplete batch are left out.
        steps: batches per epoch.
        share: this process's images of a batch.
        by_workers: whether worker processes read or augment them.
    """

    def __init__(
        self,
        data: Data,
        config: TrainingConfig,
        device: torch.device,
        share: Callable[[int], slice] = slice,
    ) -> None:
        identity = data.identity
        as_configured = ("pretrained", identity.normalization)
        assert config.normalization in as_configured, "load the data as config says"
        self.config, self.device, self.classes = config, device, len(identity.classes)
        self.mean = torch.tensor(identity.mean).view(len(identity.mean), -1).mean(dim=1).tolist()
        self.size = min(config.batch_size, len(data.train))
        self.steps = len(data.train) // self.size
        self.share = share(self.size)
        self.images = data.train
        self.by_workers = config.augmentation == "trivial" or isinstance(data.train, FileSet)
        if isinstance(data.train, ImageSet) and not self.by_workers:
            room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else None
            if room is None or data.train.images.nbytes <= room:
                self.images = data.train.to(device)

    def epoch(self, epoch: int, *, first: int) -> Iterator[ImageSet]:
        """This process's share of the batches of an epoch, from step `first` on (both 0-based).

        Raises DataError that names a file that cannot be read.
        """
        choices = _Epoch(self, epoch)
        steps = range(first, self.steps)
        source = self._from_workers if self.by_workers else self._from_memory
        for step, batch in zip(steps, source(choices, steps), strict=True):
            yield choices.augmented(batch, step)

    def _from_memory(self, choices: _Epoch, steps: range) -> Iterator[ImageSet]:
        assert isinstance(self.images, ImageSet)
        order = choices.order.to(self.images.labels.device)
        for step in steps:
            yield self.images[order[choices.rows(step)]].to(self.device)

    def _from_workers(self, choices: _Epoch, steps: range) -> Iterator[ImageSet]:
        # As arrays: tensors would be sent to the workers through shared memory.
        requests = (
            (
                choices.order[choices.rows(step)].numpy(),
                choices.uniform(step)[self.share, : augment.CROP_NUMBERS].numpy(),
                choices.seeds(step, _TRIVIAL)[self.share],
            )
            for step in steps
        )
        read = partial(_read, self.images, self.config.augmentation)
        on_gpu = self.device.type == "cuda"
        here = isinstance(self.images, ImageSet) and not on_gpu
        for pixels, labels in load(read, requests, pin=on_gpu, workers=0 if here else None):
            yield ImageSet(
                pixels.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )


class _Epoch:
    """Which images make up the batches of one epoch, and how each is augmented.

    Attributes:
        order: permutation of the training images, int64 `[N]`, on the CPU.
    """

    def __init__(self, batches: Batches, epoch: int) -> None:
        config = batches.config
        self._batches, self._config = batches, config
        self._numbers = {"seed": config.seed, "epoch": epoch}  # that all random choices follow from
        self.order, shifts, mirrored = augment.draw_epoch(
            len(batches.images), **self._numbers, shift=config.shift, flip=config.flip
        )
        self._shifts, self._mirrored = shifts.to(batches.device), mirrored.to(batches.device)

    def rows(self, step: int) -> slice:
        """This process's part of a step's batch, as a slice of the epoch's order."""
        size = self._batches.size
        mine = range(step * size, (step + 1) * size)[self._batches.share]
        return slice(mine.start, mine.stop)

    def uniform(self, step: int) -> Tensor:
        """Uniform random numbers for every image of a step's whole batch, on the CPU."""
        shape = self._batches.size, _NUMBERS[self._config.augmentation]
        return augment.step_uniform(*shape, **self._numbers, step=step)

    def seeds(self, step: int, stream: int) -> list[int]:
        """Seeds for every image of a step's whole batch, for one of torchvision's transforms."""
        return augment.step_seeds(self._batches.size, **self._numbers, step=step, stream=stream)

    def augmented(self, batch: ImageSet, step: int) -> ImageSet:
        """This process's images of a step, on the device: augmented, erased and mixed."""
        config, batches = self._config, self._batches
        images = self._augment(batch.images, step)
        if config.random_erasing:
            seeds = self.seeds(step, _ERASING)[batches.share]
            augment.erase(images, seeds, batches.mean, config.random_erasing)
        batch = ImageSet(images, batch.labels)
        if not (config.mixup or config.cutmix):
            return batch
        return augment.mix(
            batch,
            self.seeds(step, _MIXING)[0],
            mixup=config.mixup,
            cutmix=config.cutmix,
            classes=batches.classes,
        )

    def _augment(self, images: Tensor, step: int) -> Tensor:
        """Shift, flip, crop, warp and recolor images uint8 `[n, C, H, W]`, but what workers did."""
        config, rows = self._config, self.rows(step)
        shifts, mirrored = self._shifts[rows], self._mirrored[rows]
        if config.augmentation in ("shift", "trivial"):
            return shift_and_flip(images, shifts, mirrored, config.shift)
        whole = self.uniform(step)
        uniform = whole[self._batches.share]
        if config.augmentation == "svhn":
            images = augment.distort(images, like_images(uniform, images), shifts, config.shift)
        else:
            if not self._batches.by_workers:
                height, width = images.shape[2:]
                boxes = augment.boxes(height, width, uniform[:, : augment.CROP_NUMBERS])
                images = augment.crop(images, like_images(boxes, images))
            colors = uniform[:, augment.CROP_NUMBERS : -_ORDER]
            order = whole[0, -_ORDER:].argsort()  # of the whole batch, the same in all processes
            images = augment.recolor(images, like_images(colors, images), order)
        return shift_and_flip(images, torch.zeros_like(shifts), mirrored, 0)


def _read(
    part: Part,
    augmentation: str,
    request: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], list[int]],
) -> tuple[Tensor, Tensor]:
    """Read the images of a batch in a worker: whole, cropped at random or trivially augmented."""
    chosen, uniform, seeds = request
    if isinstance(part, FileSet):
        numbers = torch.from_numpy(uniform).split(1) if augmentation == "imagenet" else ()
        pixels, labels = part.read(chosen.tolist(), [partial(_box, row) for row in numbers])
    else:
        found = part[torch.from_numpy(chosen)]
        pixels, labels = found.images, found.labels
    if augmentation == "trivial":
        pixels = augment.trivially_augmented(pixels, seeds)
    return pixels, labels


def _box(uniform: Tensor, height: int, width: int) -> tuple[int, int, int, int]:
    """Choose a box (top, left, height, width) in an image of any size."""
    top, left, rows, columns = augment.boxes(height, width, uniform)[0].tolist()
    return top, left, rows, columns
