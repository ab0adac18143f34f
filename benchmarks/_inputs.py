"""Input path benchmark: images per second of eps-train and of a torchvision `DataLoader`.

Both yield batches of uint8 images on the device, with random shifts of up to 4 pixels (zero
padding) and random mirroring per image. eps-train augments whole batches on the device of the
images; the `DataLoader` runs torchvision's v2 transforms image by image, in this process and in two
worker processes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from _rounds import Options, Plan, in_turns, ratio, seconds_of
from _steps import random_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eps_train.data.batches import Batches
from eps_train.data.downloads import import_torchvision
from eps_train.data.images import ImageSet
from eps_train.recipes import cifar

IMAGES = 25_600
ROUNDS = 5
WORKERS = (0, 2)


def inputs(options: Options) -> Plan:
    """Images per second of eps-train over those of the faster `DataLoader`."""
    config = cifar("cifar10-110", dataset="cifar10", depth=110)
    data = random_images(config, IMAGES)
    assert isinstance(data.train, ImageSet)
    ours = Batches(data, config, options.device)
    sides: dict[str, Callable[[], Iterable[object]]] = {
        "ours": lambda: ours.epoch(0, first=0),
        **{
            f"loader_{workers}_workers": partial(
                _moved, _loader(data.train, config.batch_size, workers, options), options.device
            )
            for workers in WORKERS
        },
    }

    def rate(side: str) -> float:
        count = ours.steps * ours.size
        return count / seconds_of(lambda: _drain(sides[side]()), options.device)

    once = sum(ours.steps * ours.size / rate(side) for side in sides)  # also starts the workers

    def measure() -> dict[str, Any]:
        rates = in_turns({side: partial(rate, side) for side in sides}, rounds=ROUNDS)
        medians = {side: statistics.median(found) for side, found in rates.items()}
        best = max((side for side in sides if side != "ours"), key=lambda side: medians[side])
        return {
            "image": [3, 32, 32],
            "images": ours.steps * ours.size,
            "batch_size": ours.size,
            "images_per_second": medians,
            "compared_with": best,
            **ratio(rates["ours"], rates[best]),
        }

    return Plan(once * ROUNDS, measure)


class _Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images with labels as a torchvision `Dataset`."""

    def __init__(self, images: ImageSet) -> None:
        import_torchvision()
        from torchvision.transforms import v2

        self._images = images
        self._transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._transform(self._images.images[index]), self._images.labels[index]


def _loader(
    images: ImageSet, batch_size: int, workers: int, options: Options
) -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(
        _Augmented(images),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=options.device.type == "cuda",
    )


def _moved(loader: DataLoader[tuple[Tensor, Tensor]], device: torch.device) -> Iterable[object]:
    for images, labels in loader:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _drain(items: Iterable[object]) -> None:
    for _ in items:
        pass
