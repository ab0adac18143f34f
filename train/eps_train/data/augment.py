"""Data augmentation: shifts and flips, the paper's for ImageNet and SVHN, and torchvision's.

It works on batches of uint8 pixels on the device of the images. The random numbers are drawn on the
CPU, from seeds of their own, so that they are the same on every device and in every version: a
resumed run depends on it. torchvision's v2 transforms draw one choice for a whole batch, from the
global random state: only what the last section has comes from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from eps_train.data.downloads import import_torchvision
from eps_train.data.images import ImageSet

_PRIME = 1_000_003


def draw_epoch(
    count: int, *, seed: int, epoch: int, shift: int, flip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw order, shifts and flips of one epoch at once, from its own seed.

    Returns a permutation of the training images, int64 `[N]`; rows and columns, int64 `[N, 2]`,
    each 0..2 * shift; and which images are mirrored, bool `[N]`.
    """
    generator = torch.Generator().manual_seed(seed * _PRIME + epoch)
    order = torch.randperm(count, generator=generator)
    shifts = torch.randint(0, 2 * shift + 1, (count, 2), generator=generator)
    mirrored = torch.rand(count, generator=generator) < (0.5 if flip else 0.0)
    return order, shifts, mirrored


def step_uniform(*shape: int, seed: int, epoch: int, step: int) -> Tensor:
    """Uniform random numbers float32 in [0, 1) of one step of one epoch, in this `shape`.

    Drawn step by step, because the numbers of a whole epoch of a large set would fill the memory.
    """
    return torch.rand(shape, generator=_step_generator(seed, epoch, step))


def step_seeds(count: int, *, seed: int, epoch: int, step: int, stream: int) -> list[int]:
    """Seeds for `count` images of one step of one epoch; other ones in each `stream`, above 0."""
    mixed = _step_generator(seed, epoch, step).initial_seed() * _PRIME + stream
    generator = torch.Generator().manual_seed(mixed % 2**63)
    seeds: list[int] = torch.randint(2**62, (count,), generator=generator).tolist()
    return seeds


def _step_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    mixed = ((seed * _PRIME + epoch) * _PRIME + step + 1) % 2**63
    return torch.Generator().manual_seed(mixed)


def like_images(numbers: Tensor, images: Tensor) -> Tensor:
    """Copy `numbers` from the CPU to the device of `images`, without waiting for a GPU."""
    return numbers.to(images.device, non_blocking=True)


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    """Scale `[N]` random numbers in 0..1 to `low`..`high`, as `[N, 1, 1, 1]`."""
    return (low + (high - low) * uniform).view(-1, 1, 1, 1)


def _with_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply each channel's distance from its mean over the image, as in the authors' code."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (images - mean) * factor + mean


def _to_pixels(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)


def shift_and_flip(images: Tensor, shifts: Tensor, mirrored: Tensor, pad: int) -> Tensor:
    """Pad by `pad` zero pixels, crop back at `shifts`, mirror where `mirrored`.

    Images are uint8 `[N, C, H, W]`, `mirrored` bool `[N]`; `shifts` int64 `[N, 2]`, 0..2 * pad, are
    top and left of the crop in the padded image.
    """
    count, _, height, width = images.shape
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + shifts[:, 1:]
    rows = torch.arange(height, device=images.device) + shifts[:, :1]
    padded = F.pad(images, (pad, pad, pad, pad))
    index = torch.arange(count, device=images.device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# -- The paper's augmentation for ImageNet: crop of 8..100 % of the area, color jitter, lighting
#
# The ranges are those of the authors' code, but for the lighting: there it is scaled as if pixels
# went from 0 to 1, which leaves nothing of it; here as Krizhevsky et al. (NIPS 2012) describe it.

AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)  # width over height
_TRIES = 10
IMAGENET_BRIGHTNESS = 30.0  # pixel units, added or taken
IMAGENET_CONTRAST = (0.8, 1.2)
SATURATION = (0.6, 1.4)
_LIGHTING = 0.1  # standard deviation, in units of the principal components
# Principal components of ImageNet's colors (red, green, blue), as fb.resnet.torch published them.
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
_GREY = (0.299, 0.587, 0.114)  # luminance (ITU-R BT.601)

CROP_NUMBERS = 4 * _TRIES  # random numbers per image
COLOR_NUMBERS = 6
CHANGES = 4


def boxes(height: int, width: int, uniform: Tensor) -> Tensor:
    """Choose random crops of an image: top, left, height, width in pixels, int64 `[N, 4]`.

    The first of ten tries that is within the image; the whole image when none is. `uniform` are
    random numbers in 0..1, `[N, CROP_NUMBERS]`.
    """
    uniform = uniform.view(len(uniform), _TRIES, 4)
    area = (AREA[0] + (AREA[1] - AREA[0]) * uniform[..., 0]) * (height * width)
    low, high = map(math.log, ASPECT)
    aspect = torch.exp(low + (high - low) * uniform[..., 1])  # as often 3:4 as 4:3
    widths = torch.sqrt(area * aspect).round().clamp_min(1)
    heights = torch.sqrt(area / aspect).round().clamp_min(1)
    tops = (uniform[..., 2] * (height - heights + 1)).floor()
    lefts = (uniform[..., 3] * (width - widths + 1)).floor()
    tries = torch.stack([tops, lefts, heights, widths], dim=-1)
    inside = (heights <= height) & (widths <= width)
    first = inside.to(torch.uint8).argmax(dim=1)
    chosen = tries[torch.arange(len(tries), device=tries.device), first]
    whole = like_images(torch.tensor([0, 0, height, width], dtype=tries.dtype), tries)
    return torch.where(inside.any(dim=1, keepdim=True), chosen, whole).to(torch.int64)


def crop(images: Tensor, found: Tensor) -> Tensor:
    """Crop each image to its box from :func:`boxes` and resize it to its old size (bilinear).

    uint8 `[N, C, H, W]` to the same.
    """
    top, left, height, width = found.to(torch.float32).unbind(dim=1)
    size = images.shape[2:]

    def places(start: Tensor, extent: Tensor, length: int) -> Tensor:
        """Centers of the new pixels, -1..1 across the old image."""
        steps = (torch.arange(length, device=images.device) + 0.5) / length
        return 2 * (start[:, None] + extent[:, None] * steps) / length - 1

    rows, columns = places(top, height, size[0]), places(left, width, size[1])
    across, down = torch.broadcast_tensors(columns[:, None, :], rows[:, :, None])
    grid = torch.stack([across, down], dim=-1)
    pixels = images.to(torch.float32)
    return _to_pixels(F.grid_sample(pixels, grid, padding_mode="border", align_corners=False))


def recolor(images: Tensor, uniform: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and lighting, in the given order.

    uint8 `[N, C, H, W]` to the same; of grey images only brightness and contrast change. `uniform`
    are random numbers in 0..1, `[N, COLOR_NUMBERS]`; `order` is int64 `[4]`, on the CPU.
    """
    pixels = images.to(torch.float32)
    changes = [_brighten, _contrast, _saturate, _light]
    for index in order.tolist():
        if images.shape[1] == len(_GREY) or changes[index] in (_brighten, _contrast):
            pixels = changes[index](pixels, uniform)
    return _to_pixels(pixels)


def _brighten(pixels: Tensor, uniform: Tensor) -> Tensor:
    return pixels + _between(uniform[:, 0], -IMAGENET_BRIGHTNESS, IMAGENET_BRIGHTNESS)


def _contrast(pixels: Tensor, uniform: Tensor) -> Tensor:
    return _with_contrast(pixels, _between(uniform[:, 1], *IMAGENET_CONTRAST))


def _saturate(pixels: Tensor, uniform: Tensor) -> Tensor:
    factor = _between(uniform[:, 2], *SATURATION)
    grey = like_images(torch.tensor(_GREY), pixels).view(1, 3, 1, 1)
    return pixels * factor + (pixels * grey).sum(dim=1, keepdim=True) * (1 - factor)


def _light(pixels: Tensor, uniform: Tensor) -> Tensor:
    """Add to every pixel a random amount of each principal component."""
    normal = torch.special.ndtri(uniform[:, 3:6].clamp(1e-6, 1 - 1e-6))
    scale = like_images(torch.tensor(_EIGENVALUES), pixels) * (255 * _LIGHTING)
    vectors = like_images(torch.tensor(_EIGENVECTORS), pixels)
    shift: Tensor = (normal * scale) @ vectors.T
    return pixels + shift[:, :, None, None]


# -- The paper's augmentation for SVHN: brightness, contrast, elastic warp, crop
#
# The ranges are those of the training script that the authors started from (tensorpack's for
# SVHN).

SVHN_BRIGHTNESS = 10.0  # pixel units, added or taken
SVHN_CONTRAST = (0.8, 1.2)
_ANCHORS = ((0.2, 0.2), (0.2, 0.8), (0.8, 0.8), (0.8, 0.2))  # row, column, as shares of the image
_REACH = 3 / 40  # of an anchor, either way, as a share of the padded image: 3 pixels of 40
_WIDTH = 0.2  # of the bell with which a place follows an anchor: exp(-distance² / width)
NUMBERS = 2 + 2 * len(_ANCHORS)  # random numbers per image


def distort(images: Tensor, uniform: Tensor, shifts: Tensor, pad: int) -> Tensor:
    """Pad by `pad` zero pixels, change brightness and contrast, warp, crop back at `shifts`.

    The warp moves four anchors by up to 3 of 40 pixels, each way on its own, and every other place
    with them, the more so the nearer they are.

    Images and shifts are as in :func:`shift_and_flip`; `uniform` are random numbers in 0..1,
    `[N, NUMBERS]`.
    """
    padded = F.pad(images.to(torch.float32), (pad, pad, pad, pad))
    padded = (padded + _between(uniform[:, 0], -SVHN_BRIGHTNESS, SVHN_BRIGHTNESS)).clamp(0, 255)
    padded = _with_contrast(padded, _between(uniform[:, 1], *SVHN_CONTRAST)).clamp(0, 255)
    moves = (2 * uniform[:, 2:].view(len(images), len(_ANCHORS), 2) - 1) * _REACH
    # Where the pixels of the crops come from, as shares of the padded image
    anchors = like_images(torch.tensor(_ANCHORS), moves)
    places, near = [], []  # of the crop's rows, and of its columns
    for axis in (0, 1):
        window = torch.arange(images.shape[2 + axis], device=moves.device) + shifts[:, axis, None]
        places.append(window / padded.shape[2 + axis])
        distance = places[axis][:, None] - anchors[:, axis, None]
        near.append(torch.exp(-(distance**2) / _WIDTH))
    offset = torch.einsum("nkh,nkw,nkd->nhwd", *near, moves)
    rows = places[0][:, :, None] + offset[..., 0]
    columns = places[1][:, None, :] + offset[..., 1]
    height, width = (2 * length / max(length - 1, 1) for length in padded.shape[2:])
    grid = torch.stack([columns * width - 1, rows * height - 1], dim=-1)  # -1..1 across it
    warped = F.grid_sample(padded, grid, padding_mode="border", align_corners=True)
    return _to_pixels(warped)


# -- torchvision's random transforms: TrivialAugment, random erasing, MixUp and CutMix
#
# They draw from torch's global generator. It is seeded for the time of a call, by numbers that
# follow from seed, epoch and step, and restored afterwards: so a resumed run continues exactly,
# networks with dropout draw what they would draw without, and all processes of a run mix alike.


def _transforms() -> ModuleType:
    """`torchvision.transforms.v2`, which runs that use none of it do not import."""
    import_torchvision()
    from torchvision.transforms import v2

    return v2  # type: ignore[no-any-return]


@contextmanager
def _seeding() -> Iterator[Callable[[int], object]]:
    """Lend the global generator of the CPU, with a function that seeds it, for a block.

    `torch.manual_seed` would seed every GPU as well.
    """
    with torch.random.fork_rng(devices=[]):
        yield torch.default_generator.manual_seed


def trivially_augmented(images: Tensor, seeds: Iterable[int]) -> Tensor:
    """Change each image by one operation of random strength (`TrivialAugmentWide`).

    The images are uint8 `[N, 1 or 3, H, W]`, on the CPU; the seed of each decides on its operation.
    """
    transform, changed = _transforms().TrivialAugmentWide(), []
    with _seeding() as seed:
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
    v2 = _transforms()
    transform = v2.RandomErasing()
    # The transform would copy its color to a GPU for every image, and wait for it.
    pixel = like_images(torch.tensor(color).round().to(torch.uint8), images)[:, None, None]
    with _seeding() as seed:
        for image, number in zip(images, seeds, strict=True):
            seed(number)
            if torch.rand(()) < share:
                box = transform.make_params([image])
                if box["v"] is not None:  # else no box was within the image
                    v2.functional.erase(image, **{**box, "v": pixel}, inplace=True)


def mix(batch: ImageSet, number: int, *, mixup: float, cutmix: float, classes: int) -> ImageSet:
    """Mix the images of a batch with each other, and their labels: MixUp, CutMix, or either.

    Returns images float32, pixels 0..255, with labels float32 `[N, classes]`. Does not wait for the
    device.

    Args:
        batch: uint8 images with classes.
        number: decides on the kind and the share, the same for the whole batch.
        mixup, cutmix: how strongly; 0 for at most one of them, which is then not used.
        classes: number of classes.
    """
    v2 = _transforms()
    kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
    chosen = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
    with _seeding() as seed:
        seed(number)
        images, labels = v2.RandomChoice(chosen)(batch.images.to(torch.float32), batch.labels)
    return ImageSet(images, labels)
