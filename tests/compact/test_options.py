"""Options of eps-compact that choose further blocks: what each of them removes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eps_compact.cli import main
from eps_train.gating import costs
from tests.checkpoints import make_checkpoint
from tests.commands import run
from tests.train.gating.timers import LAYERS, timed_by


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SECONDS_EACH", 0.02)


def certificate(folder: Path, *args: object) -> dict[str, Any]:
    """Of a network of 9 blocks, one of which is dead."""
    make_checkpoint(dead=("stages.2.1",)).save(folder / "ckpt.pt")
    quick = ("--timer", "torch")
    result = run("eps-compact", main, "ckpt.pt", *quick, *args, cwd=folder)
    assert result.code == 0, result.stderr
    found: dict[str, Any] = json.loads((folder / "compact.json").read_text())
    return found


def test_no_more_operations_are_left_than_the_target(tmp_path: Path) -> None:
    flops = certificate(tmp_path, "--target-flops", 0.7)["counts"]["flops"]
    assert flops["after"] <= 0.7 * flops["before"]


@pytest.mark.parametrize(
    ("option", "value"), [("--target-latency", 0.7), ("--target-speedup", 1.4)]
)
def test_no_more_time_is_left_than_the_target(tmp_path: Path, option: str, value: float) -> None:
    """Of a network whose convolutions take a millisecond or two, its dead block included."""
    with timed_by(LAYERS):
        sweep = certificate(tmp_path, option, value, "--timer", "ort")["sweep"]
    asked = 1 / value if value > 1 else value
    assert (sweep["weight"], sweep["goal"]["asked"][option[2:].replace("-", "_")]) == ("ms", value)
    assert sweep["points"][0]["latency_share"]["value"] == pytest.approx((25 - 4) / 25)
    before, point = sweep["points"][sweep["goal"]["point"] - 1 :][:2]
    assert point["latency_share"]["value"] <= asked < before["latency_share"]["value"]
    assert point["latency_predicted"] == pytest.approx(point["latency_share"]["value"])


def test_a_latency_and_a_speed_up_contradict_each_other(tmp_path: Path) -> None:
    make_checkpoint().save(tmp_path / "ckpt.pt")
    both = ("--target-latency", 0.5, "--target-speedup", 2)
    result = run("eps-compact", main, "ckpt.pt", *both, cwd=tmp_path)
    assert result.code == 1
    assert "--target-latency and --target-speedup contradict each other" in result.error
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_as_much_goes_as_the_accuracy_allows(tmp_path: Path) -> None:
    """Any accuracy at all allows the smallest network of the sweep."""
    found = certificate(tmp_path, "--max-accuracy-drop", 100)
    smallest = min(point["parameters"] for point in found["sweep"]["points"])
    assert found["counts"]["parameters"]["after"] == smallest


def test_importance_and_sweep_use_so_many_samples(tmp_path: Path) -> None:
    found = certificate(tmp_path, "--importance", "--sweep", "--samples", 31)
    assert found["importance"]["samples"] == 31
    assert (found["sweep"]["chosen_on"], found["sweep"]["measured_on"]) == (15, 16)
    every = certificate(tmp_path, "--importance", "--force")["importance"]
    assert every["samples"] == every["available"] == 143, "by default up to a thousand"
