from __future__ import annotations

import torch
import torch.nn.functional as F

from eps_train.data.augment import draw_epoch, shift_and_flip, step_uniform


def test_shift_and_flip_equals_pad_crop_and_mirror_one_by_one() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 7, 9), dtype=torch.uint8)
    shifts, mirrored = torch.randint(0, 5, (20, 2)), torch.rand(20) < 0.5
    made = shift_and_flip(images, shifts, mirrored, 2)
    for image, (top, left), mirror, result in zip(
        images, shifts.tolist(), mirrored.tolist(), made, strict=True
    ):
        expected = F.pad(image, (2, 2, 2, 2))[:, top : top + 7, left : left + 9]
        assert torch.equal(result, expected.flip(-1) if mirror else expected)


def test_without_shift_and_flip_images_stay_as_they_are() -> None:
    images = torch.randint(0, 256, (4, 1, 5, 5), dtype=torch.uint8)
    _, shifts, mirrored = draw_epoch(4, seed=0, epoch=0, shift=0, flip=False)
    assert torch.equal(shift_and_flip(images, shifts, mirrored, 0), images)


def test_an_epoch_can_be_drawn_again_from_its_number() -> None:
    first = draw_epoch(50, seed=3, epoch=7, shift=1, flip=True)
    again = draw_epoch(50, seed=3, epoch=7, shift=1, flip=True)
    other = draw_epoch(50, seed=3, epoch=8, shift=1, flip=True)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


def test_an_epoch_sees_every_image_once_and_shifts_both_ways() -> None:
    order, shifts, mirrored = draw_epoch(1000, seed=0, epoch=0, shift=1, flip=True)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert set(shifts.flatten().tolist()) == {0, 1, 2}
    assert 400 < int(mirrored.sum()) < 600


def test_the_random_numbers_of_a_step_can_be_drawn_again_and_are_that_steps_own() -> None:
    drawn = {
        (seed, epoch, step): step_uniform(20, 3, seed=seed, epoch=epoch, step=step)
        for seed in (0, 1, 2**32 - 1)
        for epoch in (0, 1, 999)
        for step in (0, 1, 2)
    }
    assert len(torch.stack(list(drawn.values())).unique(dim=0)) == 27
    for (seed, epoch, step), uniform in drawn.items():
        assert torch.equal(uniform, step_uniform(20, 3, seed=seed, epoch=epoch, step=step))
