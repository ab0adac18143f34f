"""`--tracker`: a tracker of another package, through the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest

from eps_train.cli import main
from eps_train.training import trackers
from eps_train.training.paths import RunPaths
from eps_train.training.plots import Metrics
from eps_train.training.trackers import GROUP, TrackedRun, Trackers
from tests.commands import Result, files_in, run

TINY = ("--model", "cifar:8x4", "--epochs", "2", "--batch-size", "256")


class Ledger:
    """A tracker that keeps all that it is given in a file beside the run's."""

    def __init__(self, run: TrackedRun) -> None:
        self.path = run.paths.best.with_suffix(".ledger")
        self.run_id = run.run_id or f"{run.name}@1"
        self._write(["begin", self.run_id, run.config["model"], len(run.before)])

    def add(self, line: Mapping[str, Any], history: Callable[[], Metrics]) -> None:
        self._write(["add", line["epoch"], len(history())])

    def close(self, *, finished: bool) -> None:
        self._write(["close", finished])

    def _write(self, event: list[Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")


class Down(Ledger):
    def add(self, line: Mapping[str, Any], history: Callable[[], Metrics]) -> None:
        raise ConnectionError("[Errno 111] refused by [tracking] host\nwith details")


class Locked(Ledger):
    def __init__(self, run: TrackedRun) -> None:
        raise RuntimeError("no API key; log in first\nmore")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points, as `pip install` of another package leaves them."""
    offered = {"ledger": "Ledger", "down": "Down", "locked": "Locked"}
    here = [EntryPoint(name, f"{__name__}:{of}", GROUP) for name, of in offered.items()]
    here.append(EntryPoint("missing", "eps_ledger_of_nobody:Tracker", GROUP))
    ours = list(entry_points(group=GROUP))
    monkeypatch.setattr(trackers, "entry_points", lambda *, group: [*ours, *here])


def eps_train(cwd: Path, *args: object) -> Result:
    return run("eps-train", main, *TINY, "--output", "out", *args, cwd=cwd)


def ledger(folder: Path, name: str = "ckpt") -> list[list[Any]]:
    lines = (folder / "out" / f"{name}.ledger").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_it_receives_every_epoch_of_both_runs_and_their_ends(tmp_path: Path) -> None:
    result = eps_train(tmp_path, "--tracker", "ledger", "--with-baseline")
    assert result.code == 0, result.stderr
    for name in ("ckpt", "baseline"):
        assert ledger(tmp_path, name) == [
            ["begin", f"out/{name}@1", "cifar:8x4", 0],
            ["add", 1, 1],
            ["add", 2, 2],
            ["close", True],
        ]
    ids = json.loads((tmp_path / "out/trackers.json").read_text())
    assert ids == {"ledger": "out/ckpt@1"}


def test_a_resumed_run_goes_on_under_its_name(tmp_path: Path) -> None:
    assert eps_train(tmp_path, "--tracker", "ledger").code == 0
    result = eps_train(tmp_path, "--tracker", "ledger", "--epochs", 3, "--resume")
    assert result.code == 0, result.stderr
    assert ledger(tmp_path)[4:] == [
        ["begin", "out/ckpt@1", "cifar:8x4", 2],
        ["add", 3, 3],
        ["close", True],
    ]


def test_a_run_resumed_with_it_has_the_epochs_before_too(tmp_path: Path) -> None:
    assert eps_train(tmp_path).code == 0
    result = eps_train(tmp_path, "--tracker", "ledger", "--epochs", 3, "--resume")
    assert result.code == 0, result.stderr
    assert [event[:2] for event in ledger(tmp_path)[1:-1]] == [["add", 1], ["add", 2], ["add", 3]]


def test_a_run_stopped_in_its_first_epoch_goes_on_under_its_name(tmp_path: Path) -> None:
    files = RunPaths.of(tmp_path / "out")
    files.trackers.parent.mkdir()
    files.trackers.write_text('{"ledger": "theirs"}')
    with Trackers(["ledger"], print) as opened:
        opened.begin(TrackedRun(paths=files, config={"model": "m"}, epochs=2, before=[]))
    assert ledger(tmp_path)[0] == ["begin", "theirs", "m", 0]


def test_a_new_run_in_the_same_folder_has_a_name_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert eps_train(tmp_path, "--tracker", "ledger").code == 0
    for path in set(out.iterdir()) - {out / "trackers.json"}:
        path.unlink()
    result = eps_train(tmp_path)
    assert result.code == 1
    assert "trackers.json: exists already; choose another place or add --force" in result.error
    assert eps_train(tmp_path, "--force").code == 0
    assert not (out / "trackers.json").exists()


def test_a_service_that_is_down_costs_no_training(tmp_path: Path) -> None:
    result = eps_train(tmp_path, "--tracker", "down", "--tracker", "ledger")
    assert result.code == 0, result.stderr
    told = " ".join(result.stderr.split())
    expected = "--tracker down: [Errno 111] refused by [tracking] host; the run goes on without it"
    assert told.count(f"warning: {expected}") == 1
    assert ["add", 2, 2] in ledger(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("locked", "--tracker locked: no API key; log in first"),
        ("missing", "--tracker missing: No module named 'eps_ledger_of_nobody'"),
        ("nothing", "--tracker nothing: no such tracker; give one of down, ledger, locked, "),
    ],
)
def test_one_that_cannot_begin_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, expected: str
) -> None:
    result = eps_train(tmp_path, "--tracker", name)
    assert result.code == 1
    assert result.error.startswith(f"eps-train: error: {expected}")
    assert files_in(tmp_path) == {}


def test_an_interrupted_run_is_closed_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "add", interrupt)
    assert eps_train(tmp_path, "--tracker", "ledger").code == 130
    assert ledger(tmp_path)[-1] == ["close", False]
