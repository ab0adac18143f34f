"""Random choices of an epoch, and random shift and mirroring.

All augmentation works on batches of uint8 pixels, on the device where the images live. What chance
decides is drawn apart from that, on the CPU: the same numbers on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_PRIME = 1_000_003


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """All random choices of one epoch, drawn at once from its own seed.

    An epoch can so be repeated exactly from its number alone, on any device.

    Attributes:
        order: permutation of the training images, int64 `[N]`.
        shifts: rows and columns, int64 `[N, 2]`, each 0..2 * shift.
        mirrored: bool `[N]`.
    """

    order: Tensor
    shifts: Tensor
    mirrored: Tensor

    @classmethod
    def draw(cls, count: int, *, seed: int, epoch: int, shift: int, flip: bool) -> EpochOrder:
        generator = torch.Generator().manual_seed(seed * _PRIME + epoch)
        order = torch.randperm(count, generator=generator)
        shifts = torch.randint(0, 2 * shift + 1, (count, 2), generator=generator)
        mirrored = torch.rand(count, generator=generator) < (0.5 if flip else 0.0)
        return cls(order, shifts, mirrored)

    def to(self, device: torch.device) -> EpochOrder:
        return EpochOrder(self.order.to(device), self.shifts.to(device), self.mirrored.to(device))


def step_chance(*shape: int, seed: int, epoch: int, step: int) -> Tensor:
    """Uniform numbers float32 in [0, 1), `shape` of them: chance of one step of one epoch.

    Drawn step by step, because a large set's numbers for a whole epoch would fill the memory.
    """
    mixed = ((seed * _PRIME + epoch) * _PRIME + step + 1) % 2**63
    return torch.rand(shape, generator=torch.Generator().manual_seed(mixed))


def there(numbers: Tensor, images: Tensor) -> Tensor:
    """`numbers`, which lie on the CPU, where the images are; nothing waits for a GPU meanwhile."""
    return numbers.to(images.device, non_blocking=True)


def between(chance: Tensor, low: float, high: float) -> Tensor:
    """Uniform in `low`..`high` from uniform in 0..1, as `[N, 1, 1, 1]` from `[N]`."""
    return (low + (high - low) * chance).view(-1, 1, 1, 1)


def with_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Every channel's distance from its mean over the image, times `factor` `[N, 1, 1, 1]`.

    On float images `[N, C, H, W]`, as the authors' code has it.
    """
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (images - mean) * factor + mean


def to_pixels(images: Tensor) -> Tensor:
    """Float images as uint8, rounded, what lies outside 0..255 clipped."""
    return images.round().clamp(0, 255).to(torch.uint8)


def shift_and_flip(images: Tensor, shifts: Tensor, mirrored: Tensor, pad: int) -> Tensor:
    """Pad by `pad` zero pixels, crop back at `shifts`, mirror where `mirrored`.

    Args:
        images: uint8 `[N, C, H, W]`.
        shifts: int64 `[N, 2]`, top and left of the crop in the padded image, 0..2 * pad.
        mirrored: bool `[N]`.
    """
    count, _, height, width = images.shape
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + shifts[:, 1:]
    rows = torch.arange(height, device=images.device) + shifts[:, :1]
    padded = F.pad(images, (pad, pad, pad, pad))
    index = torch.arange(count, device=images.device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
