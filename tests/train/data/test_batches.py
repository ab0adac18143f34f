"""Batches from memory and from disk: what is in them, and that an epoch can be entered anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eps_core.errors import DataError
from eps_train import recipes
from eps_train.config import TrainingConfig, choices
from eps_train.data import dataset
from eps_train.data.augment import draw_epoch
from eps_train.data.batches import Batches
from eps_train.data.dataset import Data
from eps_train.data.images import FileSet, ImageSet
from tests.train.gpus import never_waiting

CPU = torch.device("cpu")
AUGMENTATIONS = choices("augmentation")


def config(augmentation: str = "shift", **changes: object) -> TrainingConfig:
    run = replace(recipes.digits(), batch_size=10, shift=1, flip=True, augmentation=augmentation)
    return replace(run, **changes)  # type: ignore[arg-type]


def half(number: int) -> Callable[[int], slice]:
    return lambda size: slice(number * size // 2, (number + 1) * size // 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images of different sizes; the brightness of each is its number."""
    root = tmp_path_factory.mktemp("images")
    for number in range(80):
        path = root / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20 + number % 7, 20 + number % 3), (2 * number,) * 3).save(path)
    return root


@pytest.fixture
def held(folder: Path) -> Data:
    return dataset.load(f"folder:{folder}", image_size=(16, 16))


@pytest.fixture
def on_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    monkeypatch.setattr(dataset, "room_for_images", lambda: 1000)
    return dataset.load(f"folder:{folder}", image_size=(16, 16))


def pixels_of(found: Batches, epoch: int, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(batch.images, batch.labels) for batch in found.epoch(epoch, first=first)]


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_the_set_decides_where_its_batches_come_from(held: Data, on_disk: Data) -> None:
    assert not Batches(held, config(), CPU).by_workers
    assert Batches(on_disk, config(), CPU).by_workers


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("where", ["held", "on_disk"])
def test_an_epoch_can_be_entered_anywhere(
    where: str, augmentation: str, request: pytest.FixtureRequest
) -> None:
    made = Batches(request.getfixturevalue(where), config(augmentation), CPU)
    whole = pixels_of(made, 3)
    assert len(whole) == made.steps == 5
    assert all(i.dtype == torch.uint8 and i.shape == (10, 3, 16, 16) for i, _ in whole)
    for first in (0, 2, 4):
        assert same(pixels_of(made, 3, first), whole[first:])
    assert not same(pixels_of(made, 4), whole)
    abandoned = made.epoch(3, first=0)
    next(abandoned)
    assert same(pixels_of(made, 3), whole)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("where", ["held", "on_disk"])
def test_processes_share_the_batches_that_one_would_have(
    where: str, augmentation: str, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(where)
    whole = pixels_of(Batches(made, config(augmentation), CPU), 1)
    shares = [Batches(made, config(augmentation), CPU, half(rank)) for rank in (0, 1)]
    assert {share.size for share in shares} == {10}
    parts = [pixels_of(share, 1) for share in shares]
    joined = [(torch.cat([a, b]), torch.cat([c, d])) for (a, c), (b, d) in zip(*parts, strict=True)]
    assert same(joined, whole)


def test_disk_and_memory_give_the_same_batches_in_the_same_order(held: Data, on_disk: Data) -> None:
    for augmentation in ("shift", "svhn", "trivial"):
        run = config(augmentation)
        assert same(
            pixels_of(Batches(held, run, CPU), 2),
            pixels_of(Batches(on_disk, run, CPU), 2),
        )


def test_an_epoch_holds_different_images_with_their_labels(on_disk: Data) -> None:
    made = Batches(on_disk, config(shift=0, flip=False), CPU)
    seen = {}
    for batch, labels in pixels_of(made, 0):
        numbers = batch.float().mean(dim=(1, 2, 3)).div(2).round().int().tolist()
        assert [number % 2 for number in numbers] == labels.tolist()
        seen.update(dict.fromkeys(numbers))
    assert len(seen) == 50


def test_a_crop_from_disk_is_one_of_the_whole_image(on_disk: Data) -> None:
    """Plain images stay plain however they are cropped, and flips change nothing."""
    made = Batches(on_disk, config("imagenet"), CPU)
    for batch, _ in pixels_of(made, 0):
        grey = batch.float().amax(dim=(2, 3)) - batch.float().amin(dim=(2, 3))
        assert float(grey.max()) == 0


def test_a_file_that_breaks_while_training_is_named(on_disk: Data) -> None:
    assert isinstance(on_disk.train, FileSet)
    made = Batches(on_disk, config(batch_size=len(on_disk.train)), CPU)
    broken = on_disk.train.path(5)
    content = broken.read_bytes()
    broken.write_bytes(content[:60])
    try:
        with pytest.raises(DataError, match=rf"{broken.name}: cannot be decoded"):
            pixels_of(made, 0)
    finally:
        broken.write_bytes(content)


def test_shifts_and_order_are_what_they_were_in_the_first_release() -> None:
    """Runs of then must go on exactly: the draw is compared with one made there."""
    order, shifts, mirrored = draw_epoch(6, seed=3, epoch=2, shift=2, flip=True)
    assert order.tolist() == [0, 4, 5, 2, 1, 3]
    assert shifts.tolist() == [[0, 1], [3, 4], [2, 4], [4, 1], [4, 3], [1, 0]]
    assert mirrored.tolist() == [False, False, False, False, True, True]


def test_the_last_incomplete_batch_is_left_out(held: Data) -> None:
    count = 23
    whole = ImageSet(torch.zeros(count, 1, 4, 4, dtype=torch.uint8), torch.arange(count))
    made = Batches(replace(held, train=whole), config(), CPU)
    assert (made.size, made.steps) == (10, 2)
    labels = torch.cat([batch.labels for batch in made.epoch(0, first=0)])
    assert len(set(labels.tolist())) == 20
    assert np.isin(labels.numpy(), np.arange(count)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("where", ["held", "on_disk"])
def test_a_gpu_gets_the_batches_that_a_cpu_would(
    where: str, augmentation: str, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(where)
    here = pixels_of(Batches(made, config(augmentation), CPU), 3)
    there = Batches(made, config(augmentation), torch.device("cuda"))
    found = list(there.epoch(3, first=0))
    assert all(batch.images.is_cuda and batch.labels.is_cuda for batch in found)
    for batch, (expected, labels) in zip(found, here, strict=True):
        assert torch.equal(batch.labels.cpu(), labels)
        difference = batch.images.cpu().int() - expected.int()
        assert int(difference.abs().max()) <= (0 if augmentation == "shift" else 1), "rounding"


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_batches_from_a_gpus_memory_wait_for_nothing(augmentation: str, held: Data) -> None:
    made = Batches(held, config(augmentation), torch.device("cuda"))
    epoch = made.epoch(0, first=0)
    next(epoch)
    with never_waiting():
        next(epoch)


@pytest.mark.gpu
def test_a_set_that_a_gpu_has_no_room_for_stays_outside(
    held: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = pixels_of(Batches(held, config(), CPU), 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    before = torch.cuda.memory_allocated()
    made = Batches(held, config(), torch.device("cuda"))
    assert torch.cuda.memory_allocated() == before
    found = [(batch.images.cpu(), batch.labels.cpu()) for batch in made.epoch(0, first=0)]
    assert same(found, here)
