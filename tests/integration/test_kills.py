"""A run that is killed, whenever that may be, and resumed ends as if it had never been stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

from eps_train.cli import main
from eps_train.training.checkpoint import Checkpoint
from tests.train.processes import start

RUN = ["--model", "cifar:8x4", "--epochs", "8", "--seed", "5", "--keep", "2"]
CHECKPOINTS = ("ckpt.pt", "last.pt", "epoch-0007.pt", "epoch-0008.pt")


def dies_while_saving() -> None:
    """Train; die by SIGKILL in the n-th fsync, in the middle of writing a file (last argument)."""
    fsync, left = os.fsync, int(sys.argv.pop())

    def deadly(handle: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    os.fsync = deadly  # type: ignore[assignment]
    main()


def train(folder: Path, *args: str) -> None:
    log = folder / "log.txt"
    process = start(main, *RUN, *args, cwd=folder, stderr=log)
    process.join()
    assert process.exitcode == 0, log.read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder)
    return folder


def test_five_kills_at_random_moments(undisturbed: Path, tmp_path: Path) -> None:
    chance, log = random.Random(0), tmp_path / "log.txt"
    for _ in range(5):
        process = start(main, *RUN, "--resume", cwd=tmp_path, stderr=log)
        process.join(chance.uniform(0.3, 2))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
    train(tmp_path, "--resume")
    assert_same_run(tmp_path, undisturbed)


def test_kills_while_saving_lose_nothing(undisturbed: Path, tmp_path: Path) -> None:
    done, log = 0, tmp_path / "log.txt"
    for fsyncs in (11, 12):
        killed = start(dies_while_saving, *RUN, "--resume", fsyncs, cwd=tmp_path, stderr=log)
        killed.join()
        assert killed.exitcode == -signal.SIGKILL, log.read_text()
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
    pipe = tmp_path / "stderr"
    os.mkfifo(pipe)
    run = start(main, *RUN, cwd=tmp_path, stderr=pipe)
    assert run.pid is not None
    with pipe.open() as stderr:
        for line in stderr:
            if line.startswith("epoch 3/8"):
                os.kill(run.pid, number)
                break
        rest = stderr.read()
    run.join()
    pipe.unlink()
    assert run.exitcode == code, rest
    assert "--resume goes on from there" in rest
    assert rest.splitlines()[-1].endswith(": interrupted")
    assert "Traceback" not in rest
    train(tmp_path, "--resume")
    assert_same_run(tmp_path, undisturbed)
