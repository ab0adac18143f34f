"""Random shift and mirroring, in batches, on the device where the images live."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        shifts = torch.randint(0, 2 * shift + 1, (count, 2), generator=generator)
        mirrored = torch.rand(count, generator=generator) < (0.5 if flip else 0.0)
        return cls(order, shifts, mirrored)

    def to(self, device: torch.device) -> EpochOrder:
        return EpochOrder(self.order.to(device), self.shifts.to(device), self.mirrored.to(device))


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
