"""torchvision's random transforms: TrivialAugment, random erasing, MixUp and CutMix.

They draw from torch's global generator. It is seeded for the time of a call, by numbers that follow
from seed, epoch and step, and restored afterwards: so a resumed run continues exactly, networks
with dropout draw what they would draw without, and all processes of a run mix alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from eps_train.config import TrainingConfig
from eps_train.data.augment import like_images
from eps_train.data.downloads import import_torchvision
from eps_train.data.images import ImageSet


def transforms() -> ModuleType:
    """`torchvision.transforms.v2`, which runs that use none of it do not import."""
    import_torchvision()
    from torchvision.transforms import v2

    return v2  # type: ignore[no-any-return]


@contextmanager
def seeding() -> Iterator[Callable[[int], object]]:
    """Lend the global generator of the CPU, with a function that seeds it, for a block.

    `torch.manual_seed` would seed every GPU as well.
    """
    with torch.random.fork_rng(devices=[]):
        yield torch.default_generator.manual_seed


def trivially_augmented(images: Tensor, seeds: Iterable[int]) -> Tensor:
    """Change each image by one operation of random strength (`TrivialAugmentWide`).

    Args:
        images: uint8 `[N, 1 or 3, H, W]`, on the CPU.
        seeds: a number for each image, which decides on its operation.
    """
    transform, changed = transforms().TrivialAugmentWide(), []
    with seeding() as seed:
        for image, number in zip(images, seeds, strict=True):
            seed(number)
            changed.append(transform(image))
    return torch.stack(changed)


def erase(images: Tensor, seeds: Sequence[int], color: Sequence[float], share: float) -> None:
    """Replace a rectangle of some images by `color`, in place (`RandomErasing`).

    Args:
        images: uint8 `[N, C, H, W]`, on any device.
        seeds: a number for each image, which decides whether and where it is erased.
        color: one value per channel, 0..255.
        share: probability that an image is erased.
    """
    v2 = transforms()
    transform = v2.RandomErasing()
    # The transform would copy its color to a GPU for every image, and wait for it.
    pixel = like_images(torch.tensor(color).round().to(torch.uint8), images)[:, None, None]
    with seeding() as seed:
        for image, number in zip(images, seeds, strict=True):
            seed(number)
            if torch.rand(()) < share:
                box = transform.make_params([image])
                if box["v"] is not None:  # else no box was within the image
                    v2.functional.erase(image, **{**box, "v": pixel}, inplace=True)


class Mixing:
    """Mixes the images of a batch with each other, and their labels: MixUp, CutMix, or either.

    Args:
        config: which, and how strongly; at least one of them.
        classes: number of classes.
    """

    def __init__(self, config: TrainingConfig, classes: int) -> None:
        v2, chosen = transforms(), []
        if config.mixup:
            chosen.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
        if config.cutmix:
            chosen.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
        self._transform = v2.RandomChoice(chosen)

    def __call__(self, batch: ImageSet, number: int) -> ImageSet:
        """Return images float32, pixels 0..255, with labels float32 `[N, classes]`.

        Does not wait for the device.

        Args:
            batch: uint8 images with classes.
            number: decides on the kind and the share, the same for the whole batch.
        """
        with seeding() as seed:
            seed(number)
            images, labels = self._transform(batch.images.to(torch.float32), batch.labels)
        return ImageSet(images, labels)
