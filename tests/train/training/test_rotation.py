from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from eps_core.errors import ConfigError
from eps_train.training.checkpoint import Checkpoint, CheckpointRotation
from eps_train.training.paths import RunPaths
from eps_train.training.trainer import Trainer
from tests.commands import files_in
from tests.train.runs import PRUNED, PRUNING, digits, pruning_trainer


def keeping(folder: Path, count: int, *, resume: bool = False, **changes: Any) -> Trainer:
    """A trainer that keeps the last `count` epochs, as `Run` prepares it."""
    files = RunPaths.of(folder)
    made = pruning_trainer(folder, **changes)
    made.rotation = CheckpointRotation(files, count)
    if resume:
        made.resume()
        made.rotation.adopt(made.config, made.data, epochs_done=made.epoch)
    return made


def train(made: Trainer, epochs: int) -> None:
    for _ in range(epochs):
        made.save(made.run_epoch())


def kept(folder: Path) -> list[int]:
    return list(RunPaths.of(folder).epoch_checkpoints())


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that keeps two epochs, after four; in the fourth a block dies."""
    folder = tmp_path_factory.mktemp("four")
    train(keeping(folder, 2), 4)
    return folder


@pytest.fixture
def folder(four: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    shutil.copytree(four, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_the_last_epochs_are_kept_each_with_all_that_last_pt_had(four: Path) -> None:
    assert kept(four) == [3, 4]
    assert (four / "epoch-0004.pt").read_bytes() == (four / "last.pt").read_bytes()
    older = Checkpoint.load(four / "epoch-0003.pt")
    assert older.metrics["epoch"] == 3
    assert older.resume is not None


def test_a_resumed_run_goes_on_rotating(folder: Path) -> None:
    train(keeping(folder, 2, resume=True), 1)
    assert kept(folder) == [4, 5]


def test_resumed_with_fewer_to_keep_the_others_go(folder: Path) -> None:
    train(keeping(folder, 1, resume=True), 1)
    assert kept(folder) == [5]


def test_resumed_without_keep_what_is_there_stays(folder: Path) -> None:
    train(keeping(folder, 0, resume=True), 1)
    assert kept(folder) == [3, 4]


def test_one_of_them_as_last_pt_takes_the_run_back(folder: Path) -> None:
    """Before the epoch in which a block died: it dies again, and all ends in the same weights."""
    died = tuple(block for block, epoch in PRUNED.items() if epoch == 4)
    whole = Checkpoint.load(folder / "last.pt")
    shutil.copy(folder / "epoch-0003.pt", folder / "last.pt")
    again = keeping(folder, 2, resume=True)
    assert again.epoch == 3
    assert not again.pruner.tracker.dead
    train(again, 1)
    repeated = Checkpoint.load(folder / "last.pt")
    assert repeated.dead == whole.dead == died != ()
    assert repeated.gates == whole.gates
    assert all(torch.equal(repeated.state[name], whole.state[name]) for name in whole.state)
    assert kept(folder) == [3, 4]


def test_files_of_another_origin_are_never_removed(folder: Path) -> None:
    """One of another seed, one renamed, one that is no checkpoint."""
    foreign = pruning_trainer(folder / "other", seed=9)
    foreign.save(foreign.run_epoch())
    shutil.copy(folder / "other" / "last.pt", folder / "epoch-0001.pt")
    (folder / "epoch-0002.pt").write_text("notes")
    shutil.copy(folder / "epoch-0003.pt", folder / "epoch-0003-good.pt")
    shutil.copy(folder / "epoch-0003.pt", folder / "epoch-0000.pt")
    before = files_in(folder)
    train(keeping(folder, 1, resume=True), 2)
    after = files_in(folder)
    for name in ("epoch-0000.pt", "epoch-0001.pt", "epoch-0002.pt", "epoch-0003-good.pt"):
        assert after[name] == before[name]
    assert kept(folder) == [0, 1, 2, 6]


def test_a_file_of_another_origin_in_the_way_is_refused(folder: Path) -> None:
    (folder / "epoch-0006.pt").write_text("notes")
    with pytest.raises(ConfigError, match=r"epoch-0006\.pt: was not written by this run"):
        keeping(folder, 2, resume=True)
    assert (folder / "epoch-0006.pt").read_text() == "notes"


def test_a_full_disk_takes_neither_the_older_ones_nor_last_pt(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_in(folder)
    again = keeping(folder, 2, resume=True)
    report = again.run_epoch()
    write_bytes = Path.open

    def full(self: Path, *args: object, **options: object) -> object:
        if self.name == ".epoch-0005.pt.part":
            raise OSError(28, "No space left on device")
        return write_bytes(self, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        again.save(report)
    assert raised.value.filename == str(folder / "epoch-0005.pt")
    after = files_in(folder)
    del before["ckpt.pt"], after["ckpt.pt"]  # the epoch may have been the best one
    assert after == before
    Checkpoint.load(folder / "ckpt.pt")


def test_a_baseline_keeps_its_own(four: Path, tmp_path: Path) -> None:
    files = RunPaths.of(tmp_path, "baseline")
    made = Trainer(
        PRUNING.baseline(),
        digits(),
        best_path=files.best,
        last_path=files.last,
        device=torch.device("cpu"),
        rotation=CheckpointRotation(files, 1),
    )
    train(made, 2)
    assert files.epoch_checkpoint(2).name == "baseline-epoch-0002.pt"
    assert list(files.epoch_checkpoints()) == [2]
    assert RunPaths.of(tmp_path).epoch_checkpoints() == {}, "not those of the other run"
