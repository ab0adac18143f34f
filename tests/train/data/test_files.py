"""Images on disk, read by worker processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from eps_core import cli, machine
from eps_core.errors import DataError
from eps_core.preprocessing import Preprocessing
from eps_train.data import images as loading
from eps_train.data.images import FileSet, ImageSet, load, worker_count
from eps_train.training.evaluate import BATCH, logits, score
from tests.commands import run

HOW = Preprocessing(resize=(5, 4), crop=(5, 4), color="grey")


@pytest.fixture
def files(tmp_path: Path) -> FileSet:
    """Twenty images, the first of more than one batch."""
    random = np.random.default_rng(0)
    names = [f"{index % 3}/{index:02}.png" for index in range(20)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (5, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return FileSet.of(tmp_path, names, [index % 3 for index in range(20)], HOW)


def test_batches_hold_every_image_once_in_order(files: FileSet) -> None:
    batches = list(files.batches(6))
    assert [len(batch) for batch in batches] == [6, 6, 6, 2]
    pixels = torch.cat([batch.images for batch in batches])
    expected = np.stack([HOW.read(files.path(index)) for index in range(20)])
    assert np.array_equal(pixels.numpy(), expected)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), files.labels)
    assert torch.equal(files.images, pixels)


def test_a_part_of_it_is_read_alone(files: FileSet) -> None:
    chosen = torch.tensor([17, 2, 5])
    assert torch.equal(files[chosen].images, files.images[chosen])
    assert files[chosen].labels.tolist() == [2, 2, 2]


def test_a_broken_file_is_one_line_also_from_a_worker(files: FileSet) -> None:
    files.path(13).write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError) as error:
        list(files.batches(6))
    assert str(error.value).startswith(f"{files.path(13)}: not an image")
    assert "\n" not in str(error.value)


def test_evaluation_from_disk_equals_that_from_memory(files: FileSet) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 3))

    def normalize(images: Tensor) -> Tensor:
        return images.float() / 255

    held = ImageSet(files.images, files.labels)
    assert BATCH > 20
    assert torch.equal(logits(model, normalize, files), logits(model, normalize, held.images))  # type: ignore[arg-type]
    assert score(model, normalize, files) == score(model, normalize, held)  # type: ignore[arg-type]


def test_names_need_not_be_ascii(tmp_path: Path) -> None:
    Image.new("L", (4, 5), 7).save(tmp_path / "größe – 大.png")
    files = FileSet.of(tmp_path, ["größe – 大.png"], [0], HOW)
    assert files.images.unique().tolist() == [7]


# -- workers ------------------------------------------------------------------------------------


def double(number: int) -> tuple[Tensor]:
    return (torch.tensor(2 * number),)


def fail(number: int) -> tuple[Tensor]:
    raise DataError(f"{number} is not to be read")


def die(number: int) -> tuple[Tensor]:
    os._exit(9)


@pytest.mark.parametrize("workers", [0, 2])
def test_answers_come_in_order(workers: int) -> None:
    answers = load(double, iter(range(30)), workers=workers)
    assert [int(answer) for (answer,) in answers] == list(range(0, 60, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_draws_no_random_numbers_of_the_networks(workers: int) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(load(double, range(5), workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_passed_on_as_it_is(workers: int) -> None:
    with pytest.raises(DataError, match=r"^4 is not to be read$"):
        list(load(fail, [4], workers=workers))


def test_a_worker_that_dies_is_one_line() -> None:
    with pytest.raises(DataError, match=r"a process that reads the images has died .*--shm-size"):
        list(load(die, [4], workers=1))


def slow(number: int) -> tuple[Tensor]:
    time.sleep(0.02 * number)
    return (torch.tensor(os.getpid()),)


def test_a_worker_that_is_killed_while_the_network_computes_is_one_line(tmp_path: Path) -> None:
    """torch raises its error from a signal handler, wherever the program is."""

    @click.command()
    def train() -> None:
        answers = load(slow, iter(range(50)), workers=1)
        os.kill(int(next(answers)[0]), signal.SIGKILL)
        for _ in range(10_000):  # a signal handler runs between two steps of the program
            time.sleep(0.01)

    result = run("eps-train", lambda: cli.run(train), cwd=tmp_path)
    assert result.code == 1
    assert result.stderr.startswith("eps-train: error: a process that reads the images has died (")
    assert "signal: Killed" in result.stderr
    assert len(result.stderr.splitlines()) == 1


class Unsharable(Tensor):
    def share_memory_(self) -> Unsharable:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")


def unsharable(number: int) -> tuple[Tensor]:
    return (torch.zeros(3).as_subclass(Unsharable),)


def test_shared_memory_that_runs_out_is_one_line_and_no_wait_without_end() -> None:
    with pytest.raises(DataError, match=r"shared memory is full .*No space .*--shm-size 8g"):
        list(load(unsharable, [4], workers=1))


@pytest.mark.parametrize(
    ("free", "workers"), [(None, 4), (10**9, 4), (1000, 4), (999, 3), (400, 1), (399, 0), (0, 0)]
)
def test_no_more_workers_than_find_room_in_shared_memory(
    free: int | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two answers ahead a worker, and two on the way."""
    monkeypatch.setattr(machine, "shared_memory", lambda: free)
    assert loading._fitting_workers(4, 100) == workers


def test_the_64_mb_of_a_container_are_enough_to_scan_with_eight_workers(
    files: FileSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "shared_memory", lambda: 64 << 20)
    assert loading._fitting_workers(8, loading._CHUNK) == 8
    monkeypatch.setattr(loading, "_CHUNK", 3 * 5 * 4)  # three images
    monkeypatch.setattr(loading, "worker_count", lambda: 2)
    expected = np.stack([HOW.read(files.path(index)) for index in range(20)])
    for free in (None, 64 << 20, 0):
        monkeypatch.setattr(machine, "shared_memory", lambda free=free: free)
        assert np.array_equal(files.images.numpy(), expected)


def test_a_scan_decodes_images_into_their_places(files: FileSet) -> None:
    held, found = files.scan(keep=True)
    assert not found.problems
    assert torch.equal(held.images, torch.cat([batch.images for batch in files.batches(6)]))
    files.path(3).write_bytes(b"no image")
    held, found = files.scan(keep=True)
    assert list(found.problems) == [str(files.path(3))]
    assert found.problems == files.scan(keep=False)[1].problems
    assert held.images[3].count_nonzero() == 0
    assert len(files.without(found.problems)) == 19


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 0), (2, 1, 2), (8, 4, 2), (4, 4, 0), (128, 1, 16)]
)
def test_one_worker_a_core_shared_among_processes(
    cores: int, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert worker_count() == workers
