"""The training loop on sets that stay on disk, and with mean images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from eps_train import recipes
from eps_train.data import dataset
from eps_train.data.dataset import Data
from eps_train.data.images import FileSet
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.trainer import Stopped, Trainer
from tests.train import runs
from tests.train.data.test_imagenet import write_set

CPU = torch.device("cpu")
SMALL = replace(
    recipes.recipe("imagenet-101"),
    model="imagenet:18x8",  # with 4 channels torch 2.13 writes past its memory on AMD CPUs
    image_size=(32, 32),
    epochs=2,
    batch_size=9,
    cpu_threads=1,
)


def trainer(folder: Path, made: Data, *, stop_after: int | None = None) -> Trainer:
    folder.mkdir(exist_ok=True)
    steps = iter(range(1000))
    return Trainer(
        SMALL,
        made,
        best_path=folder / "ckpt.pt",
        last_path=folder / "last.pt",
        device=CPU,
        stop=lambda: stop_after is not None and next(steps) >= stop_after,
    )


def train(made: Trainer) -> Checkpoint:
    return made.run(lambda report: None)


def test_a_run_from_disk_resumes_exactly_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    made = dataset.load("imagenet", tmp_path / "set", image_size=SMALL.image_size)
    whole = train(trainer(tmp_path / "whole", made))
    assert whole.metrics["test"]["samples"] == 9
    stopped = trainer(tmp_path / "parts", made, stop_after=1)
    with pytest.raises(Stopped):
        train(stopped)
    assert (stopped.epoch, stopped.step) == (0, 2)
    resumed = trainer(tmp_path / "parts", made)
    resumed.resume()
    train(resumed)
    last = [Checkpoint.load(tmp_path / part / "last.pt") for part in ("whole", "parts")]
    assert last[0].metrics["validation"] == last[1].metrics["validation"]
    for name, tensor in last[0].state.items():
        assert torch.equal(tensor, last[1].state[name]), name


def test_a_network_is_trained_and_tested_alike_from_disk_and_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        path = tmp_path / "set" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9), 4 * number + number % 2).save(path)
    found = []
    for memory in (8 << 30, 300):
        monkeypatch.setattr(dataset, "room_for_images", lambda memory=memory: memory)
        made = dataset.load(f"folder:{tmp_path / 'set'}", image_size=(8, 8))
        assert isinstance(made.train, FileSet) == (memory == 300)
        folder = tmp_path / str(memory)
        folder.mkdir()
        run = replace(runs.PRUNING, epochs=2, batch_size=8, epsilon=0.0)
        made_trainer = Trainer(
            run, made, best_path=folder / "a", last_path=folder / "b", device=CPU
        )
        found.append(train(made_trainer))
    assert found[0].metrics["test"] == found[1].metrics["test"]
    for name, tensor in found[0].state.items():
        assert torch.equal(tensor, found[1].state[name]), name


def test_a_mean_image_is_what_the_network_is_trained_with(tmp_path: Path) -> None:
    made = dataset.load("digits", normalization="pixel")
    run = replace(runs.PRUNING, normalization="pixel", epochs=1)
    made_trainer = Trainer(
        run, made, best_path=tmp_path / "a", last_path=tmp_path / "b", device=CPU
    )
    assert made_trainer.normalize.mean.shape == (1, 1, 8, 8)
    best = train(made_trainer)
    again = Checkpoint.load(tmp_path / "a")
    assert again.data == best.data == made.identity
    assert again.data.normalization == "pixel"
