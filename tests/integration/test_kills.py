"""A run that is killed, whenever that may be, and resumed ends as if it had never been stopped."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eps_train.training.checkpoint import Checkpoint

COMMAND = [sys.executable, "-c", "from eps_train.cli import main; main()"]
RUN = ["--model", "cifar:8x4", "--epochs", "8", "--seed", "5", "--keep", "2"]
CHECKPOINTS = ("ckpt.pt", "last.pt", "epoch-0007.pt", "epoch-0008.pt")

# Dies by its own SIGKILL in the n-th fsync: in the middle of writing one of the files.
DIES_WHILE_SAVING = """
import os, signal, sys
fsync, left = os.fsync, int(sys.argv.pop())
def deadly(handle):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(handle)
os.fsync = deadly
from eps_train.cli import main; main()
"""


def train(folder: Path, *args: str) -> None:
    subprocess.run([*COMMAND, *RUN, *args], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder)
    return folder


def test_five_kills_at_random_moments(undisturbed: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(5):
        try:  # `run` ends a process that outlives its time with SIGKILL
            subprocess.run(
                [*COMMAND, *RUN, "--resume"],
                cwd=tmp_path,
                timeout=chance.uniform(2, 6),
                capture_output=True,
                check=True,
            )
        except subprocess.TimeoutExpired:
            continue
    train(tmp_path, "--resume")
    assert_same_run(tmp_path, undisturbed)


def test_kills_while_saving_lose_nothing(undisturbed: Path, tmp_path: Path) -> None:
    done = 0
    for fsyncs in (11, 12):
        killed = subprocess.run(
            [sys.executable, "-c", DIES_WHILE_SAVING, *RUN, "--resume", str(fsyncs)],
            cwd=tmp_path,
            capture_output=True,
            check=False,
        )
        assert killed.returncode == -9
        for path in tmp_path.glob("*.pt"):
            Checkpoint.load(path)
        last = Checkpoint.load(tmp_path / "last.pt")
        assert last.metrics["epoch"] >= done, "an epoch that was saved is lost"
        done = last.metrics["epoch"]
    train(tmp_path, "--resume")
    assert_same_run(tmp_path, undisturbed)
    assert not list(tmp_path.glob(".*.part"))


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert {path.name for path in ours.glob("*.pt")} == set(CHECKPOINTS)
    for name in CHECKPOINTS:
        mine, other = Checkpoint.load(ours / name), Checkpoint.load(theirs / name)
        assert mine.state.keys() == other.state.keys()
        for tensor in mine.state:
            assert torch.equal(mine.state[tensor], other.state[tensor]), (name, tensor)
        assert mine.gates == other.gates
        assert mine.metrics["test"] == other.metrics["test"]
        assert mine.metrics["validation"] == other.metrics["validation"]
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (ours, theirs)]
    epochs = [[json.loads(line)["epoch"] for line in part] for part in lines]
    assert epochs[0] == epochs[1] == list(range(1, 9))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step_and_says_how_to_go_on(
    undisturbed: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with subprocess.Popen([*COMMAND, *RUN], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if line.startswith("epoch 3/8"):
                run.send_signal(number)
                break
        rest = run.stderr.read()
    assert run.returncode == code
    assert "--resume goes on from there" in rest
    assert rest.splitlines()[-1].endswith(": interrupted")
    assert "Traceback" not in rest
    train(tmp_path, "--resume")
    assert_same_run(tmp_path, undisturbed)
