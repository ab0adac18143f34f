"""A training that is killed twenty times, at any moment and in three ways, loses nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eps_train.training.checkpoint import Checkpoint
from eps_train.training.paths import RunPaths

ROOT = Path(__file__).parents[2]
EPOCHS, KILLS, KEPT = 60, 20, 3
# The command; its Trainer is that in whose run blocks certainly die.
COMMAND = [
    sys.executable,
    "-c",
    "from eps_train import cli, run; from tests.train.runs import PruningTrainer;"
    " run.Trainer = PruningTrainer; cli.main()",
]
RUN = [
    *("--model", "cifar:20x4", "--epochs", str(EPOCHS)),
    *("--keep", str(KEPT), "--tracker", "tensorboard"),
]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def train(folder: Path, *args: str) -> None:
    subprocess.run([*COMMAND, *RUN, *args], cwd=folder, check=True, capture_output=True)


def killed(folder: Path, chance: random.Random, *, most: int) -> bool:
    """Go on with the run, and kill it: while it starts, or within or after up to `most` epochs.

    Returns whether it was still alive then.
    """
    number = chance.choice(SIGNALS)
    epochs = chance.choice((None, 0, 1, 2, 3))
    delay = chance.uniform(0, 2.0 if epochs is None else 0.4)  # seconds
    if not most:  # the end is near, and kills are left
        epochs, delay = 0, 0.0
    with subprocess.Popen(
        [*COMMAND, *RUN, "--resume"], cwd=folder, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None
        said = []
        while epochs is not None and (line := run.stderr.readline()):
            said.append(line)
            begun = [
                line for line in said if line.startswith("epoch ") or "epochs to train" in line
            ]
            if len(begun) > min(epochs, most):
                break
        try:
            run.wait(delay)
        except subprocess.TimeoutExpired:
            run.send_signal(number)
        said.append(run.stderr.read())
    assert "error:" not in "".join(said), said
    return run.returncode != 0


def progress(folder: Path) -> tuple[int, int]:
    """Epoch and step that `last.pt` holds; every file is looked at on the way."""
    files = RunPaths.of(folder)
    for path in (files.best, *files.epoch_checkpoints().values()):
        if path.exists():
            Checkpoint.load(path)
    if files.metrics.exists():
        whole = files.metrics.read_text().rpartition("\n")[0]
        epochs = [json.loads(line)["epoch"] for line in whole.splitlines()]
        assert epochs == list(range(1, len(epochs) + 1))
    if not files.last.exists():
        return 0, 0
    state = Checkpoint.load(files.last).resume
    assert state is not None
    return state["epoch"], state["step"]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes on an idle core, but many more beside other work
def test_twenty_kills_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)  # for `tests`
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    train(undisturbed)
    chance = random.Random(20)
    kills, done = 0, (0, 0)
    while kills < KILLS:
        kills += killed(disturbed, chance, most=max(0, EPOCHS - 20 - done[0]))
        here = progress(disturbed)
        assert here >= done, "what was saved is lost"
        assert here < (EPOCHS, 0), "it has to be killed more often"
        done = here
    train(disturbed, "--resume")
    assert_same(RunPaths.of(disturbed), RunPaths.of(undisturbed))
    assert not list(disturbed.rglob(".*.part"))


def assert_same(ours: RunPaths, theirs: RunPaths) -> None:
    assert list(ours.epoch_checkpoints()) == list(theirs.epoch_checkpoints()) == [58, 59, 60]
    for name in (
        "ckpt.pt",
        "last.pt",
        *(path.name for path in theirs.epoch_checkpoints().values()),
    ):
        mine, other = (Checkpoint.load(files.last.with_name(name)) for files in (ours, theirs))
        assert plain(mine.state) == plain(other.state), name
        assert plain(mine.side_head) == plain(other.side_head), name
        assert mine.gates == other.gates, name
        assert mine.dead, "no block died: too little was tried"
        assert plain(timeless(mine.metrics)) == plain(timeless(other.metrics)), name
        assert plain(timeless(mine.resume)) == plain(timeless(other.resume)), name
    lines = [
        [timeless(json.loads(line)) for line in files.metrics.read_text().splitlines()]
        for files in (ours, theirs)
    ]
    assert lines[0] == lines[1]
    for files in (ours, theirs):
        events = EventAccumulator(str(files.tensorboard))
        events.Reload()
        shown = events.Scalars("loss/training")
        assert [scalar.step for scalar in shown] == list(range(1, EPOCHS + 1))


def timeless(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """Without what only tells how long things took."""
    return record and {
        name: value
        for name, value in record.items()
        if name not in ("seconds", "images_per_second")
    }


def plain(value: Any) -> Any:
    """Tensors, at any depth, as bytes: what is equal then is so bit by bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
