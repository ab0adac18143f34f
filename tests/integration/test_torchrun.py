"""Two processes as torchrun starts, stops and restarts them; each test takes half a minute."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eps_train.training.checkpoint import Checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc"),
]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
RUN = ["--model", "cifar:8x4", "--epochs", "12", "--batch-size", "32", "--seed", "5"]


def start(folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*TORCHRUN, *launcher, "-m", "eps_train", *RUN, *arguments]
    return subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def train(folder: Path, *arguments: str) -> str:
    with start(folder, *arguments) as run:
        stdout, stderr = run.communicate()
    assert run.returncode == 0, stderr
    return stdout


def wait_for(run: subprocess.Popen[str], beginning: str) -> str:
    """What the run has said on stderr until it says that."""
    assert run.stderr is not None
    said = ""
    for line in run.stderr:
        said += line
        if line.startswith(beginning):
            return said
    raise AssertionError(f"it never said {beginning!r}:\n{said}")


def workers(run: subprocess.Popen[str]) -> list[int]:
    """The process numbers of what torchrun has started, by rank."""
    found = {}
    for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [entry for entry in environment if entry.startswith(b"RANK=")]
        if ranks:
            found[int(ranks[0].removeprefix(b"RANK="))] = int(child)
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    summary = json.loads(train(folder, "--json").splitlines()[-1])
    assert summary["runs"][0]["processes"] == 2
    return folder


def assert_same_run(ours: Path, theirs: Path) -> None:
    for name in ("ckpt.pt", "last.pt"):
        mine, other = Checkpoint.load(ours / name), Checkpoint.load(theirs / name)
        assert mine.state.keys() == other.state.keys()
        for tensor in mine.state:
            assert torch.equal(mine.state[tensor], other.state[tensor]), (name, tensor)
        assert mine.gates == other.gates
        assert mine.metrics["test"] == other.metrics["test"]
    lines = (ours / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 13))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_replaced_and_the_run_goes_on(
    undisturbed: Path, tmp_path: Path, rank: int
) -> None:
    with start(tmp_path, "--force", launcher=("--max-restarts", "2")) as run:
        wait_for(run, "epoch  3/12")
        os.kill(workers(run)[rank], signal.SIGKILL)
        _, stderr = run.communicate()
    assert run.returncode == 0, stderr
    assert "epochs to train" in stderr, "it started again"
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_and_the_run_goes_on(
    undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with start(tmp_path) as run:
        wait_for(run, "epoch  3/12")
        if number == signal.SIGINT:  # as a terminal does, to every process; torchrun sends it again
            for process in workers(run):
                os.kill(process, number)
        run.send_signal(number)
        _, stderr = run.communicate()
    assert run.returncode != 0
    assert "last.pt holds" in stderr
    assert stderr.count("eps-train: interrupted") == 1
    train(tmp_path, "--resume")
    assert_same_run(tmp_path, undisturbed)


def test_a_second_run_in_the_same_folder_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    with start(tmp_path, "--epochs", "500") as first:
        wait_for(first, "epoch   1/500")
        with start(tmp_path, "--epochs", "500", "--force") as second:
            _, stderr = second.communicate()
        assert second.returncode != 0
        assert stderr.count("another eps-train is writing there") == 1
        first.terminate()
        first.communicate()


def test_what_exists_is_not_overwritten(undisturbed: Path) -> None:
    before = (undisturbed / "ckpt.pt").read_bytes()
    with start(undisturbed) as run:
        _, stderr = run.communicate()
    assert run.returncode != 0
    assert "ckpt.pt: exists already" in stderr
    assert (undisturbed / "ckpt.pt").read_bytes() == before
