"""Mean and std of a training part, and their summary."""

from __future__ import annotations

import pytest
import torch

from eps_core.errors import ConfigError, DataError
from eps_train.data import dataset
from eps_train.data.images import ImageSet
from eps_train.models.resnets import Normalize


def part(count: int = 30) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 4, 5), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.zeros(count, dtype=torch.int64))


def test_a_mean_image_is_summed_up_as_its_mean_per_channel() -> None:
    mean, std = dataset.measure(part(), "pixel")
    by_channel, _ = dataset.measure(part(), "channel")
    found = dataset.summary(mean, std)
    assert found["kind"] == "pixel"
    assert found["mean"] == pytest.approx(list(by_channel))
    assert found["std"] == [128.0] * 3


def test_per_channel_numbers_are_given_as_they_are() -> None:
    mean, std = dataset.measure(part(), "channel")
    expected = {"kind": "channel", "mean": list(mean), "std": list(std)}
    assert dataset.summary(mean, std) == expected


def test_the_sum_of_many_bright_images_does_not_overflow() -> None:
    bright = ImageSet(torch.full((70_000, 1, 2, 2), 255, dtype=torch.uint8), torch.zeros(70_000))
    bright.images[:, :, 0, 0] = 254
    mean, _ = dataset.measure(bright, "pixel")
    assert mean == (((254.0, 255.0), (255.0, 255.0)),)


@pytest.mark.parametrize("kind", ["channel", "pixel"])
def test_images_of_one_color_are_refused(kind: str) -> None:
    plain = torch.tensor([9, 0, 255], dtype=torch.uint8).view(1, 3, 1, 1).repeat(20, 1, 4, 5)
    labels = torch.zeros(20, dtype=torch.int64)
    with pytest.raises(DataError, match=r"all one color \(every pixel is 9, 0, 255 of 255\)"):
        dataset.measure(ImageSet(plain, labels), kind)
    plain[7, 1, 2, 2] = 1
    dataset.measure(ImageSet(plain, labels), kind)


@pytest.mark.parametrize("kind", ["channel", "pixel"])
def test_normalised_training_images_are_centred(kind: str) -> None:
    images = part().images
    mean, std = dataset.measure(part(), kind)
    found = Normalize(list(mean), list(std))(images)
    assert found.shape == images.shape
    assert found.dtype == torch.float32
    assert float(found.mean().abs()) < 1e-5


def test_statistics_of_other_images_are_made_to_fit() -> None:
    rgb = ((10.0, 20.0, 60.0), (1.0, 2.0, 3.0))
    assert dataset.fitting(rgb, (3, 8, 8)) == rgb
    assert dataset.fitting(rgb, (1, 8, 8)) == ((30.0,), (2.0,))
    image = ((((1.0, 3.0), (5.0, 7.0)),), (128.0,))
    assert dataset.fitting(image, (1, 2, 2)) == image
    assert dataset.fitting(image, (1, 9, 9)) == ((4.0,), (128.0,))
    with pytest.raises(ConfigError, match="the weights are for images of 1 channels, the data has"):
        dataset.fitting(image, (3, 2, 2))


def test_a_set_that_is_loaded_again_keeps_its_statistics() -> None:
    identity = dataset.load("digits", statistics=((100.0,), (50.0,))).identity
    assert (identity.mean, identity.std) == ((100.0,), (50.0,))
    again = dataset.load_again(identity).identity
    assert (again.mean, again.std) == ((100.0,), (50.0,))
