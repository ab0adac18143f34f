"""torchvision's random transforms in batches: what they do, and what their numbers follow from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from eps_train import recipes
from eps_train.config import TrainingConfig
from eps_train.data.augment import erase, mix, trivially_augmented
from eps_train.data.batches import Batches
from eps_train.data.images import ImageSet
from tests.train.runs import digits

pytestmark = pytest.mark.usefixtures("torchvision_models")

CPU = torch.device("cpu")
RANDOM = {"random_erasing": 0.5, "mixup": 0.4, "cutmix": 1.0}


def config(**changes: object) -> TrainingConfig:
    return replace(recipes.digits(), batch_size=96, **changes)  # type: ignore[arg-type]


def noise(count: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, 3, 12, 12), dtype=torch.uint8, generator=generator)


def test_each_image_is_augmented_by_its_own_seed() -> None:
    images = noise()[:1].repeat(8, 1, 1, 1)
    seeds = [1, 2, 3, 4, 5, 6, 7, 1]
    before = torch.get_rng_state()
    found = trivially_augmented(images, seeds)
    assert torch.equal(torch.get_rng_state(), before)
    assert (found.shape, found.dtype) == (images.shape, torch.uint8)
    assert torch.equal(found[0], found[7])
    assert len({image.numpy().tobytes() for image in found}) > 3
    assert torch.equal(trivially_augmented(images[2:4], seeds[2:4]), found[2:4])


def test_a_rectangle_of_some_images_gets_the_mean_color() -> None:
    images, color = noise(60), (0.0, 3.4, 200.0)
    erased = images.clone()
    before = torch.get_rng_state()
    erase(erased, range(60), color, 0.5)
    assert torch.equal(torch.get_rng_state(), before)
    changed = (erased != images).any(dim=1)
    touched = int(changed.flatten(1).any(dim=1).sum())
    assert 15 < touched < 45
    for image, mask in zip(erased, changed, strict=True):
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        if len(rows):
            box = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            expected = torch.tensor([0, 3, 200], dtype=torch.uint8)
            assert torch.equal(box, expected[:, None, None].expand_as(box))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_mixed_by_the_share_of_the_pixels(kind: str) -> None:
    images, labels = torch.zeros(4, 1, 10, 10, dtype=torch.uint8), torch.tensor([0, 1, 2, 1])
    images[0] = 100  # the only bright one, so the share of each image can be read off the pixels
    alphas = {"mixup": 0.0, "cutmix": 0.0, kind: 1.0}
    mixed = mix(ImageSet(images, labels), 5, **alphas, classes=3)
    assert mixed.images.dtype == mixed.labels.dtype == torch.float32
    own, other = (mixed.images[row].mean().item() / 100 for row in (0, 1))
    assert own + other == pytest.approx(1)
    assert 0 < own < 1
    expected = [[own, other, 0], [other, own, 0], [0, other, own], [0, own, other]]
    assert torch.allclose(mixed.labels, torch.tensor(expected), atol=1e-6)


def test_of_two_kinds_each_batch_gets_one() -> None:
    images = torch.tensor([0, 100], dtype=torch.uint8).view(2, 1, 1, 1).repeat(1, 1, 8, 8)
    batch = ImageSet(images, torch.tensor([0, 1]))
    values = {
        len(mix(batch, number, mixup=1.0, cutmix=1.0, classes=2).images[0].unique())
        for number in range(20)
    }
    assert values == {1, 2}, "one value where blended, two where pasted"


def test_every_draw_follows_from_seed_epoch_and_step() -> None:
    torch.manual_seed(1)
    made = Batches(digits(), config(**RANDOM), CPU)
    whole = list(made.epoch(2, first=0))
    torch.manual_seed(2)
    again = list(made.epoch(2, first=3))
    for one, other in zip(whole[3:], again, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    other_epoch = next(iter(made.epoch(3, first=0)))
    assert not torch.equal(whole[0].labels, other_epoch.labels)


def test_processes_mix_by_the_same_share() -> None:
    run = config(mixup=1.0)
    halves = [slice(0, 48), slice(48, 96)]
    shares = [Batches(digits(), run, CPU, lambda _, mine=mine: mine) for mine in halves]  # type: ignore[misc]
    first, second = (next(iter(share.epoch(0, first=0))).labels for share in shares)
    assert first.shape == (48, 10)
    assert set(first.unique().tolist()) == set(second.unique().tolist())
