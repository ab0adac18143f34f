"""Crop, color and lighting for ImageNet, against PIL and torchvision where they do the same."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageEnhance

from eps_train.data.augment import COLOR_NUMBERS, CROP_NUMBERS, boxes, crop, recolor

ORDER = torch.arange(4)


def nothing(count: int) -> torch.Tensor:
    """Random numbers that leave colors as they are: the middle of every range."""
    return torch.full((count, COLOR_NUMBERS), 0.5)


def noise(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_boxes_cover_8_to_100_percent_at_aspects_of_3_4_to_4_3_within_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    for height, width in ((375, 500), (500, 375), (64, 64)):
        found = boxes(height, width, torch.rand(4000, CROP_NUMBERS, generator=generator))
        top, left, rows, columns = found.double().unbind(dim=1)
        assert bool((top >= 0).all() and (left >= 0).all())
        assert bool((top + rows <= height).all() and (left + columns <= width).all())
        share, aspect = rows * columns / (height * width), columns / rows
        assert 0.07 < share.min() < 0.12
        assert 0.9 < share.max() <= 1
        assert 0.70 < aspect.min() < 0.78
        assert 1.28 < aspect.max() < 1.42
        # Every place is reached, no side more than the other.
        assert top.min() == left.min() == 0
        assert bool(((top + rows) == height).any() and ((left + columns) == width).any())
        middle = (top + rows / 2).mean() / height
        assert abs(middle - 0.5) < 0.02


def test_an_image_that_holds_no_such_box_is_taken_whole() -> None:
    found = boxes(1000, 3, torch.rand(50, CROP_NUMBERS))
    assert found.unique(dim=0).tolist() == [[0, 0, 1000, 3]]


def test_a_crop_is_scaled_as_pillow_does() -> None:
    images = noise(3, 3, 40, 30)
    chosen = torch.tensor([[0, 0, 40, 30], [5, 7, 20, 15], [12, 3, 11, 13]])
    found = crop(images, chosen)
    for image, (top, left, height, width), made in zip(images, chosen.tolist(), found, strict=True):
        part = image[:, top : top + height, left : left + width].permute(1, 2, 0).numpy()
        expected = Image.fromarray(part).resize((30, 40), Image.Resampling.BILINEAR)
        difference = made.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)
        # At its edges ours sees half a pixel of what lies beyond the crop.
        assert np.abs(difference[4:-4, 4:-4]).max() <= 1
    assert torch.equal(found[0], images[0])


def test_the_middle_of_every_range_changes_no_color() -> None:
    images = noise(5, 3, 9, 7)
    assert torch.equal(recolor(images, nothing(5), ORDER), images)


def test_brightness_is_added() -> None:
    images = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    uniform = nothing(2)
    uniform[:, 0] = torch.tensor([0.0, 0.75])
    assert recolor(images, uniform, ORDER).amax(dim=(1, 2, 3)).tolist() == [70, 115]


def test_contrast_is_about_the_mean_of_each_channel() -> None:
    images = (noise(1, 3, 8, 8) // 2) + 60  # nothing is clipped
    uniform = nothing(1)
    uniform[:, 1] = 1.0
    mean = images.double().mean(dim=(2, 3), keepdim=True)
    expected = ((images - mean) * 1.2 + mean).round()
    assert (recolor(images, uniform, ORDER) - expected).abs().max() <= 1


def test_saturation_is_that_of_pillow() -> None:
    images = noise(1, 3, 8, 8)
    for share, factor in ((0.0, 0.6), (1.0, 1.4)):
        uniform = nothing(1)
        uniform[:, 2] = share
        made = recolor(images, uniform, ORDER)[0].permute(1, 2, 0).numpy().astype(int)
        whole = Image.fromarray(images[0].permute(1, 2, 0).numpy())
        assert np.abs(made - np.asarray(ImageEnhance.Color(whole).enhance(factor))).max() <= 1


def test_lighting_moves_all_pixels_along_the_principal_components() -> None:
    images = torch.full((1, 3, 4, 4), 128, dtype=torch.uint8)
    for component, vector in enumerate(
        ((-0.5675, -0.5808, -0.5836), (0.7192, -0.0045, -0.6948), (0.4009, -0.8140, 0.4203))
    ):
        uniform = nothing(1)
        uniform[0, 3 + component] = 0.9986501  # three standard deviations
        value = (0.2175, 0.0188, 0.0045)[component]
        expected = 128 + 3 * 0.1 * value * 255 * torch.tensor(vector)
        found = recolor(images, uniform, ORDER)[0].float()
        assert float((found - expected[:, None, None]).abs().max()) <= 0.6


def test_the_order_of_the_changes_matters_and_is_given() -> None:
    images, uniform = noise(4, 3, 8, 8), torch.rand(4, COLOR_NUMBERS)
    one = recolor(images, uniform, torch.tensor([0, 1, 2, 3]))
    other = recolor(images, uniform, torch.tensor([3, 2, 1, 0]))
    assert not torch.equal(one, other)
    assert torch.equal(one, recolor(images, uniform, torch.tensor([0, 1, 2, 3])))


def test_grey_images_stay_grey() -> None:
    images = noise(4, 1, 8, 8)
    made = recolor(images, torch.rand(4, COLOR_NUMBERS), torch.tensor([2, 0, 3, 1]))
    assert made.shape == images.shape
    assert not torch.equal(made, images)
