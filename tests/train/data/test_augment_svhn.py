"""The warp for SVHN against the formulas of the authors' library, written out pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import torch

from eps_train.data.augment import NUMBERS, distort

ANCHORS = ((0.2, 0.2), (0.2, 0.8), (0.8, 0.8), (0.8, 0.2))


def nothing(count: int) -> torch.Tensor:
    """Random numbers that leave an image as it is: the middle of every range."""
    return torch.full((count, NUMBERS), 0.5)


def by_hand(image: torch.Tensor, uniform: list[float], top: int, left: int) -> np.ndarray:
    """Pad to 40x40, brightness, contrast, warp and crop of one 32x32 image."""
    padded = np.pad(image.numpy().astype(np.float64), ((0, 0), (4, 4), (4, 4)))
    padded = np.clip(padded + (2 * uniform[0] - 1) * 10, 0, 255)
    mean = padded.mean(axis=(1, 2), keepdims=True)
    padded = np.clip((padded - mean) * (0.8 + 0.4 * uniform[1]) + mean, 0, 255)
    moves = (2 * np.array(uniform[2:]).reshape(4, 2) - 1) * 3
    found = np.empty((3, 32, 32))
    for row in range(32):
        for column in range(32):
            y, x = float(row + top), float(column + left)
            weights = [
                math.exp(-(((row + top) / 40 - a) ** 2 + ((column + left) / 40 - b) ** 2) / 0.2)
                for a, b in ANCHORS
            ]
            y = min(max(y + float(np.dot(weights, moves[:, 0])), 0), 39)
            x = min(max(x + float(np.dot(weights, moves[:, 1])), 0), 39)
            low_y, low_x = int(y), int(x)
            high_y, high_x = min(low_y + 1, 39), min(low_x + 1, 39)
            dy, dx = y - low_y, x - low_x
            found[:, row, column] = (
                padded[:, low_y, low_x] * (1 - dy) * (1 - dx)
                + padded[:, low_y, high_x] * (1 - dy) * dx
                + padded[:, high_y, low_x] * dy * (1 - dx)
                + padded[:, high_y, high_x] * dy * dx
            )
    return found


def test_it_is_the_authors_augmentation() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)
    uniform = torch.rand(3, NUMBERS, generator=generator)
    shifts = torch.tensor([[0, 8], [3, 1], [4, 4]])
    found = distort(images, uniform, shifts, 4)
    assert found.dtype == torch.uint8
    for index, (top, left) in enumerate(shifts.tolist()):
        expected = by_hand(images[index], uniform[index].tolist(), top, left)
        assert np.abs(found[index].numpy() - expected).max() < 0.51, "rounding, and no more"


def test_the_middle_of_every_range_changes_nothing() -> None:
    images = torch.randint(0, 256, (4, 1, 9, 7), dtype=torch.uint8)
    centre = torch.full((4, 2), 2)
    assert torch.equal(distort(images, nothing(4), centre, 2), images)


def test_every_image_has_its_own_random_numbers() -> None:
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(5, -1, -1, -1)
    uniform, shifts = torch.rand(5, NUMBERS), torch.randint(0, 9, (5, 2))
    together = distort(images, uniform, shifts, 4)
    for index in range(5):
        alone = distort(images[:1], uniform[index : index + 1], shifts[index : index + 1], 4)
        assert torch.equal(together[index], alone[0])
    assert len(together.unique(dim=0)) == 5
