"""What a run leaves and says, when it is made to keep and to show more than it does by default."""

from __future__ import annotations

import hashlib
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eps_core.errors import ConfigError, DataError, Interrupted
from eps_train.config import TrainingConfig
from eps_train.integrations.tensorboard import TensorBoard
from eps_train.training import run as run_module
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.paths import RunPaths
from eps_train.training.run import Run
from eps_train.training.trainer import Trainer
from tests.commands import files_in
from tests.train.runs import PRUNING, PruningTrainer, digits

SHORT = replace(PRUNING, model="cifar:8x4", epochs=3, batch_size=256, epsilon=1.0)


def run(folder: Path, config: TrainingConfig = SHORT, **options: Any) -> Run:
    return Run(
        config,
        digits(),
        RunPaths.of(folder),
        device=torch.device("cpu"),
        **{"resume": False, "weights": None, **options},
    )


def steps(folder: Path) -> list[int]:
    events = EventAccumulator(str(RunPaths.of(folder).tensorboard))
    events.Reload()
    return [scalar.step for scalar in events.Scalars("loss/training")]


def stop_after(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    """Have SIGTERM arrive when so many epochs are saved."""
    save = Trainer.save

    def interrupted(self: Trainer, report: Any) -> None:
        save(self, report)
        if self.epoch == epochs:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "save", interrupted)


def test_stopped_and_resumed_it_leaves_the_same_as_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        run(tmp_path, keep=2, trackers=["tensorboard"]).train()
    monkeypatch.undo()
    run(tmp_path, keep=2, trackers=["tensorboard"], resume=True).train()
    assert list(RunPaths.of(tmp_path).epoch_checkpoints()) == [2, 3]
    assert steps(tmp_path) == [1, 2, 3]


def test_a_kill_before_the_rotation_is_made_up_for(tmp_path: Path) -> None:
    run(tmp_path, keep=2).train()
    files = RunPaths.of(tmp_path)
    first = Checkpoint.load(files.epoch_checkpoint(2))
    first.metrics["epoch"] = 1
    first.save(files.epoch_checkpoint(1))
    run(tmp_path, keep=2, resume=True).train()
    assert list(files.epoch_checkpoints()) == [2, 3]


def test_by_default_there_is_nothing_more(tmp_path: Path) -> None:
    run(tmp_path).train()
    assert set(files_in(tmp_path)) == {
        "ckpt.pt",
        "config.json",
        "last.pt",
        "metrics.jsonl",
        "training.png",
    }


def test_a_checkpoint_of_another_origin_is_found_before_anything_is_written(tmp_path: Path) -> None:
    run(tmp_path, replace(SHORT, epochs=3)).train()
    (tmp_path / "last.pt").unlink()
    (tmp_path / "epoch-0002.pt").write_text("notes")
    before = files_in(tmp_path)
    with pytest.raises(ConfigError, match=r"epoch-0002\.pt: was not written by this run"):
        run(tmp_path, resume=True, keep=1)
    assert files_in(tmp_path) == before


def test_an_event_file_that_cannot_be_written_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add = TensorBoard.add

    def full(self: TensorBoard, line: Any, history: Any) -> None:
        if line["epoch"] == 2:
            raise OSError(28, "No space left on device", str(self.path))
        add(self, line, history)

    monkeypatch.setattr(TensorBoard, "add", full)
    run(tmp_path, trackers=["tensorboard"]).train()
    told = " ".join(capsys.readouterr().err.split())
    assert "warning: --tracker tensorboard: " in told
    assert "No space left on device; the run goes on without it" in told
    assert steps(tmp_path) == [1]
    assert Checkpoint.load(RunPaths.of(tmp_path).last).metrics["epoch"] == 3


@pytest.mark.parametrize(
    "error", [DataError("a.png: gone"), RuntimeError("DataLoader worker (pid 3) is killed")]
)
def test_images_that_fail_in_the_middle_of_a_run_do_not_hide_what_is_kept(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_epoch = Trainer.run_epoch

    def failing(self: Trainer) -> Any:
        if self.epoch == 1:
            raise error
        return run_epoch(self)

    monkeypatch.setattr(Trainer, "run_epoch", failing)
    with pytest.raises(type(error)):
        run(tmp_path).train()
    assert "last.pt holds 1 of 3 epochs; --resume goes on from there" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is full")
def test_on_a_device_that_is_full_the_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = run(tmp_path, replace(SHORT, epochs=1))
    path, open_ = tmp_path / "metrics.jsonl", Path.open

    def full(self: Path, mode: str = "r", **options: Any) -> Any:
        device = Path("/dev/full") if self == path and mode[0] == "a" else self
        return open_(device, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        prepared.train()
    assert raised.value.filename == str(path)


def test_warnings_come_before_training_and_not_again_on_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        run(tmp_path).train()
    monkeypatch.undo()
    first = capsys.readouterr().err.splitlines()
    warned = [line for line in first if line.startswith("warning: few blocks or none will die")]
    assert len(warned) == 1
    assert first.index(warned[0]) < first.index("ε-ResNet: 3 epochs to train")
    run(tmp_path, resume=True).train()
    assert "warning" not in capsys.readouterr().err


def test_a_run_that_goes_well_is_not_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks die in it, and the decay acts in full."""
    monkeypatch.setattr(run_module, "Trainer", PruningTrainer)
    run(tmp_path, replace(PRUNING, weight_decay=2e-2)).train()
    told = capsys.readouterr().err
    assert "died:" in told
    assert "params" in told
    assert "warning" not in told


def test_a_baseline_is_not_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, SHORT.baseline()).train()
    assert "warning" not in capsys.readouterr().err


def test_the_checkpoint_says_which_weights_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "mine.pt"
    torch.save(run(tmp_path / "first").trainer.model.state_dict(), weights)
    stop_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        run(tmp_path / "second", weights=weights).train()
    run(tmp_path / "second", resume=True).train()
    recorded = Checkpoint.load(tmp_path / "second" / "ckpt.pt").metrics["started_from"]
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert recorded == {"file": "mine.pt", "sha256": digest}
