"""Options of eps-compact that choose further blocks: what each of them takes out."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from eps_compact.cli import main
from tests.checkpoints import make_checkpoint
from tests.commands import run


class Told(Exception):
    """What a function was called with; it ends the command."""


def certificate(folder: Path, *args: object) -> dict[str, Any]:
    """Of a network of 9 blocks, one of which is dead."""
    make_checkpoint(dead=("stages.2.1",)).save(folder / "ckpt.pt")
    quick = ("--seconds", 4, "--timer", "torch")
    result = run("eps-compact", main, "ckpt.pt", *quick, *args, cwd=folder)
    assert result.code == 0, result.stderr
    found: dict[str, Any] = json.loads((folder / "compact.json").read_text())
    return found


def test_no_more_operations_are_left_than_the_target(tmp_path: Path) -> None:
    flops = certificate(tmp_path, "--target-flops", 0.7)["counts"]["flops"]
    assert flops["after"] <= 0.7 * flops["before"]


def test_as_much_goes_as_the_accuracy_allows(tmp_path: Path) -> None:
    """Any accuracy at all allows the smallest network of the sweep."""
    found = certificate(tmp_path, "--max-accuracy-drop", 100)
    smallest = min(point["parameters"] for point in found["sweep"]["points"])
    assert found["counts"]["parameters"]["after"] == smallest


@pytest.mark.parametrize(
    ("option", "module", "function"),
    [("--sweep", "sweep", "sweep"), ("--importance", "importance", "importance")],
)
def test_sweep_and_ledger_have_so_many_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, module: str, function: str
) -> None:
    def told(*args: object, seconds: float, **rest: object) -> None:
        raise Told(seconds)

    monkeypatch.setattr(importlib.import_module(f"eps_compact.analysis.{module}"), function, told)
    with pytest.raises(Told, match=r"^3\.5$"):
        certificate(tmp_path, option, "--seconds", 3.5)
