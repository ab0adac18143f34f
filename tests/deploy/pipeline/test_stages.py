"""Stages: what a killed deployment had finished is taken up, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eps_deploy.pipeline.build import Stages


class Work:
    """Counts how often it is done."""

    def __init__(self, result: Any = 1) -> None:
        self.result, self.done = result, 0

    def __call__(self) -> Any:
        self.done += 1
        return self.result


def test_resuming_takes_the_result_of_before(tmp_path: Path) -> None:
    work = Work({"p50": 1.25, "names": ["a", "ε"]})
    Stages(tmp_path / "s", resume=False).data("latency", {"model": "abc"}, work)
    later = Stages(tmp_path / "s", resume=True)
    assert later.has("latency", {"model": "abc"})
    assert later.data("latency", {"model": "abc"}, work) == work.result
    assert (work.done, later.resumed) == (1, ["latency"])


def test_without_resume_it_is_done_again(tmp_path: Path) -> None:
    work = Work(b"model")
    for _ in range(2):
        stages = Stages(tmp_path / "s", resume=False)
        assert stages.content("export", {}, work) == b"model"
    assert (work.done, stages.resumed) == (2, [])


@pytest.mark.parametrize("changed", [{"model": "b", "limit": 1}, {"model": "a", "limit": 2}])
def test_a_changed_input_is_another_result(tmp_path: Path, changed: dict[str, Any]) -> None:
    work = Work()
    Stages(tmp_path / "s", resume=False).data("parity", {"model": "a", "limit": 1}, work)
    later = Stages(tmp_path / "s", resume=True)
    assert not later.has("parity", changed)
    later.data("parity", changed, work)
    assert work.done == 2


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    work = Work(b"weights")
    Stages(tmp_path / "s", resume=False).content("export", {}, work)
    (path,) = (tmp_path / "s").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert Stages(tmp_path / "s", resume=True).content("export", {}, work) == b"weights"
    assert work.done == 2


def test_clearing_leaves_nothing(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "s", resume=False)
    stages.content("export", {}, Work(b""))
    stages.clear()
    stages.clear()
    assert not list(tmp_path.iterdir())
