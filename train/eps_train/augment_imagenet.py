"""The paper's augmentation for ImageNet: crop of 8..100 % of the area, colour jitter, lighting.

The ranges are those of the authors' code, but for the lighting: there it is scaled as if pixels
went from 0 to 1, which leaves nothing of it; here as Krizhevsky et al. (NIPS 2012) describe it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from eps_train.augment import between, there, to_pixels, with_contrast

AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)  # width over height
_TRIES = 10
BRIGHTNESS = 30.0  # pixel units, added or taken
CONTRAST = (0.8, 1.2)
SATURATION = (0.6, 1.4)
_LIGHTING = 0.1  # standard deviation, in units of the principal components
# Principal components of ImageNet's colours (red, green, blue), as fb.resnet.torch published them.
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
_GREY = (0.299, 0.587, 0.114)  # luminance (ITU-R BT.601)

CROP_NUMBERS = 4 * _TRIES  # that chance has to give for an image
COLOR_NUMBERS = 6
CHANGES = 4


def boxes(height: int, width: int, chance: Tensor) -> Tensor:
    """Random crops of an image: top, left, height, width in pixels, int64 `[N, 4]`.

    Of ten tries the first that lies within the image; the whole image when none does.

    Args:
        height, width: of the image.
        chance: `[N, CROP_NUMBERS]`, uniform in 0..1.
    """
    chance = chance.view(len(chance), _TRIES, 4)
    area = (AREA[0] + (AREA[1] - AREA[0]) * chance[..., 0]) * (height * width)
    low, high = map(math.log, ASPECT)
    aspect = torch.exp(low + (high - low) * chance[..., 1])  # as often 3:4 as 4:3
    widths = torch.sqrt(area * aspect).round().clamp_min(1)
    heights = torch.sqrt(area / aspect).round().clamp_min(1)
    tops = (chance[..., 2] * (height - heights + 1)).floor()
    lefts = (chance[..., 3] * (width - widths + 1)).floor()
    tries = torch.stack([tops, lefts, heights, widths], dim=-1)
    inside = (heights <= height) & (widths <= width)
    first = inside.to(torch.uint8).argmax(dim=1)
    chosen = tries[torch.arange(len(tries), device=tries.device), first]
    whole = there(torch.tensor([0, 0, height, width], dtype=tries.dtype), tries)
    return torch.where(inside.any(dim=1, keepdim=True), chosen, whole).to(torch.int64)


def crop(images: Tensor, found: Tensor) -> Tensor:
    """Each image's box (as :func:`boxes` gives them), scaled up to the size of the images.

    Bilinear. uint8 `[N, C, H, W]` to the same.
    """
    top, left, height, width = found.to(torch.float32).unbind(dim=1)
    size = images.shape[2:]

    def places(start: Tensor, extent: Tensor, length: int) -> Tensor:
        """Centres of the new pixels, -1..1 across the old image."""
        steps = (torch.arange(length, device=images.device) + 0.5) / length
        return 2 * (start[:, None] + extent[:, None] * steps) / length - 1

    rows, columns = places(top, height, size[0]), places(left, width, size[1])
    grid = torch.stack(
        [
            columns[:, None, :].expand(-1, size[0], -1),
            rows[:, :, None].expand(-1, -1, size[1]),
        ],
        dim=-1,
    )
    pixels = images.to(torch.float32)
    return to_pixels(F.grid_sample(pixels, grid, padding_mode="border", align_corners=False))


def recolor(images: Tensor, chance: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and lighting, in the given order.

    uint8 `[N, C, H, W]` to the same; on grey images brightness and contrast alone.

    Args:
        images: as above.
        chance: `[N, COLOR_NUMBERS]`, uniform in 0..1.
        order: order of the changes, int64 `[4]`, on the CPU.
    """
    pixels = images.to(torch.float32)
    changes = [_brighten, _contrast, _saturate, _light]
    for index in order.tolist():
        if images.shape[1] == len(_GREY) or changes[index] in (_brighten, _contrast):
            pixels = changes[index](pixels, chance)
    return to_pixels(pixels)


def _brighten(pixels: Tensor, chance: Tensor) -> Tensor:
    return pixels + between(chance[:, 0], -BRIGHTNESS, BRIGHTNESS)


def _contrast(pixels: Tensor, chance: Tensor) -> Tensor:
    return with_contrast(pixels, between(chance[:, 1], *CONTRAST))


def _saturate(pixels: Tensor, chance: Tensor) -> Tensor:
    factor = between(chance[:, 2], *SATURATION)
    grey = there(torch.tensor(_GREY), pixels).view(1, 3, 1, 1)
    return pixels * factor + (pixels * grey).sum(dim=1, keepdim=True) * (1 - factor)


def _light(pixels: Tensor, chance: Tensor) -> Tensor:
    """Add to every pixel a random amount of each principal component."""
    normal = torch.special.ndtri(chance[:, 3:6].clamp(1e-6, 1 - 1e-6))
    scale = there(torch.tensor(_EIGENVALUES), pixels) * (255 * _LIGHTING)
    vectors = there(torch.tensor(_EIGENVECTORS), pixels)
    shift: Tensor = (normal * scale) @ vectors.T
    return pixels + shift[:, :, None, None]
