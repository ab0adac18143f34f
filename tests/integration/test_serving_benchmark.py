"""`benchmarks/serving.py`: what it concludes from loads, and one short run with the real server."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from typing import Any

import pytest

from eps_core.machine import Conditions
from tests.meta.project import ROOT

SCRIPT = ROOT / "benchmarks" / "serving.py"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any]:
    """`_standings`, `_turns` and `_wrk`, as the script finds them."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    names = ("_standings", "_turns", "_wrk")
    found = [importlib.import_module(name) for name in names]
    return found[0], found[1], found[2]


class Made:
    """Turns without servers."""

    def __init__(self, modules: tuple[Any, Any, Any]) -> None:
        self.standings, self._turns, self._wrk = modules

    def turns(self, rates: list[float], *, failed: int = 0, others: float = 0.0) -> list[Any]:
        """Loads of a second each that were answered at these rates, where the floor is at 1000."""
        return [
            self._turns.Turn(
                load=self._wrk.Load(
                    seconds=1.0, requests=int(rate), failed=failed, p50_ms=10.0, p99_ms=20.0
                ),
                floor=1000.0,
                cores=1.2,
                waited=0.1,
                conditions=Conditions(
                    seconds=1.0,
                    cores=2,
                    load=None,
                    others=others,
                    stolen=0.0,
                    cpu_mhz=None,
                    governor=None,
                    gpu=None,
                ),
            )
            for rate in rates
        ]

    def verdict(self, sides: dict[str, list[Any]], milliseconds: float = 2.5) -> dict[str, Any]:
        found: dict[str, Any] = self.standings.judge([self.standings.row(16, sides)], milliseconds)
        return found


@pytest.fixture
def made(modules: tuple[Any, Any, Any]) -> Made:
    return Made(modules)


def test_near_the_floor_and_faster_than_the_other(made: Made) -> None:
    sides = {"ours": made.turns([930, 910, 920]), "other": made.turns([600, 610, 620])}
    found = made.standings.row(16, sides)
    assert found["sides"]["ours"]["requests_per_second"]["median"] == 920
    assert found["ours_over"]["other"]["ours_is"] == "faster"
    assert made.verdict(sides) == {
        "limit": 0.80,
        "aim": 0.90,
        "slower_than": [],
        "passed": True,
        "over_floor": 0.92,
        "aim_reached": True,
    }


def test_too_far_from_the_floor(made: Made) -> None:
    found = made.verdict({"ours": made.turns([790, 780, 770])})
    assert (found["passed"], found["aim_reached"]) == (False, False)


def test_slower_than_another(made: Made) -> None:
    sides = {"ours": made.turns([850, 860, 855]), "other": made.turns([990, 980, 985])}
    found = made.verdict(sides)
    assert found["slower_than"] == [[16, "other"]]
    assert found["passed"] is False


def test_a_load_with_failures_counts_for_nothing(made: Made) -> None:
    ours, failing = made.turns([850, 860, 855]), made.turns([990, 980, 985], failed=3)
    row = made.standings.row(16, {"ours": ours, "other": failing})
    assert row["sides"]["other"]["valid"] is False
    assert row["ours_over"]["other"]["ours_is"] is None
    assert made.verdict({"ours": ours, "other": failing})["passed"] is True
    assert made.verdict({"ours": made.turns([850, 860], failed=1)})["passed"] is False


def test_nothing_is_concluded_on_a_busy_machine(made: Made) -> None:
    found = made.verdict({"ours": made.turns([930, 910, 920], others=50.0)})
    assert found["passed"] is None
    assert found["over_floor"] == 0.92


def test_nothing_is_concluded_of_a_network_that_is_too_small(made: Made) -> None:
    assert made.verdict({"ours": made.turns([930, 910])}, milliseconds=1.0)["passed"] is None


def test_peers_cannot_be_installed_nowhere() -> None:
    done = run("--install-peers")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "Error: --install-peers needs --peers DIR"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk")
def test_a_short_run_without_peers() -> None:
    done = run("--seconds", "1", "--repeats", "1", "--connections", "2", "--depth", "8")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (row,) = found["rows"]
    assert row["sides"]["ours"]["failed"] == 0
    assert row["sides"]["ours"]["requests_per_second"]["median"] > 1
    absent = {entry["what"] for entry in found["not_run"]}
    assert absent == {"pytriton", "mlserver", "litserve", "bentoml"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
