"""The paper's augmentation for SVHN: brightness, contrast, elastic warp, crop.

The ranges are those of the training script that the authors started from (tensorpack's for SVHN).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eps_train.augment import between, there, to_pixels, with_contrast

BRIGHTNESS = 10.0  # pixel units, added or taken
CONTRAST = (0.8, 1.2)
_ANCHORS = ((0.2, 0.2), (0.2, 0.8), (0.8, 0.8), (0.8, 0.2))  # row, column, as shares of the image
_REACH = 3 / 40  # of an anchor, either way, as a share of the padded image: 3 pixels of 40
_WIDTH = 0.2  # of the bell with which a place follows an anchor: exp(-distance² / width)
NUMBERS = 2 + 2 * len(_ANCHORS)  # that chance has to give for an image


def distort(images: Tensor, chance: Tensor, shifts: Tensor, pad: int) -> Tensor:
    """Pad by `pad` zero pixels, change brightness and contrast, warp, crop back at `shifts`.

    The warp moves four anchors by up to 3 of 40 pixels, each way on its own, and every other place
    with them, the more so the nearer they are.

    Args:
        images: uint8 `[N, C, H, W]`.
        chance: `[N, NUMBERS]`, uniform in 0..1.
        shifts: int64 `[N, 2]`, top and left of the crop in the padded image, 0..2 * pad.
        pad: pixels.
    """
    padded = F.pad(images.to(torch.float32), (pad, pad, pad, pad))
    padded = (padded + between(chance[:, 0], -BRIGHTNESS, BRIGHTNESS)).clamp(0, 255)
    padded = with_contrast(padded, between(chance[:, 1], *CONTRAST)).clamp(0, 255)
    moves = (2 * chance[:, 2:].view(len(images), len(_ANCHORS), 2) - 1) * _REACH
    grid = _warped(moves, shifts, images.shape[2:], padded.shape[2:])
    warped = F.grid_sample(padded, grid, padding_mode="border", align_corners=True)
    return to_pixels(warped)


def _warped(
    moves: Tensor, shifts: Tensor, size: tuple[int, ...], padded: tuple[int, ...]
) -> Tensor:
    """Where the pixels of the crops come from: `[N, H, W, (x, y)]`, -1..1 across the padded image.

    `moves` are those of the anchors `[N, anchors, (row, column)]`, as shares of the padded image.
    """
    places = []  # of the crop's rows, and of its columns, as shares of the padded image
    for axis in (0, 1):
        window = torch.arange(size[axis], device=moves.device) + shifts[:, axis, None]
        places.append(window / padded[axis])
    anchors = there(torch.tensor(_ANCHORS), moves)
    near_row, near_column = (
        torch.exp(-((place[:, None] - anchors[:, axis, None]) ** 2) / _WIDTH)
        for axis, place in enumerate(places)
    )
    offset = torch.einsum("nkh,nkw,nkd->nhwd", near_row, near_column, moves)
    rows = places[0][:, :, None] + offset[..., 0]
    columns = places[1][:, None, :] + offset[..., 1]
    ends = [2 * length / max(length - 1, 1) for length in padded]
    return torch.stack([columns * ends[1] - 1, rows * ends[0] - 1], dim=-1)
