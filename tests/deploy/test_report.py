"""Checks and their wording; report.md."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eps_compact.intervals import Interval
from eps_deploy import report
from eps_deploy.accuracy import Drop, accuracy_drop
from eps_deploy.latency import Latency
from eps_deploy.parity import Parity
from eps_deploy.report_markdown import render, verdict_line

PARITY = Parity(
    stage="compact-onnx",
    max_abs=0.5,
    relative=0.01,
    limit=0.02,
    top1_agreement=1.0,
    worst_sample=3,
    worst_batch=2,
    samples=33,
    batches=(1, 2),
)
LATENCY = Latency(
    batch=1,
    baseline_ms={"p50": 2.0, "p90": 2.0, "p95": 2.0, "p99": 2.0},
    compact_ms={"p50": 1.0, "p90": 1.0, "p95": 1.0, "p99": 1.0},
    speedup=Interval(2.0, 1.8, 2.2),
    blocks=5,
    runs=10,
    warm=True,
)


def dropped(lost: int, total: int) -> Drop:
    engine = np.arange(total) >= lost
    return accuracy_drop(np.ones(total, dtype=bool), engine, limit=0.5)


def test_parity_check() -> None:
    check = report.parity_check(PARITY)
    assert (check.name, check.passed, check.value, check.limit) == (
        "parity-compact-onnx",
        True,
        0.01,
        0.02,
    )
    assert not report.parity_check(replace(PARITY, limit=0.001)).passed
    assert "not finite" in report.parity_check(replace(PARITY, max_abs=None, relative=None)).text
    assert "differ by 0.5" in report.parity_check(replace(PARITY, limit=0.0)).text


def test_accuracy_check_says_when_there_are_too_few_images() -> None:
    few, many = report.accuracy_check(dropped(0, 359)), report.accuracy_check(dropped(0, 10_000))
    assert (few.passed, few.conclusive, many.passed, many.conclusive) == (True, False, True, True)
    assert "too few images to tell" in few.text
    assert "too few" not in many.text


def test_accuracy_check_says_which_way() -> None:
    assert "1.00 points below the baseline" in report.accuracy_check(dropped(10, 1000)).text
    assert not report.accuracy_check(dropped(10, 1000)).passed


def test_the_speedup_s_lower_end_is_judged() -> None:
    assert report.speedup_check(LATENCY, 1.8).passed
    near = report.speedup_check(LATENCY, 1.9)
    assert (near.passed, near.conclusive, near.value) == (False, False, 1.8)
    far = report.speedup_check(LATENCY, 3.0)
    assert (far.passed, far.conclusive) == (False, True)


def test_no_nan_gets_into_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_json(tmp_path / "report.json", {"value": float("nan")})
    assert not (tmp_path / "report.json").exists()


@pytest.fixture
def found(deployed: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((deployed / "bundle" / "report.json").read_bytes())
    return loaded


def test_the_markdown_starts_with_the_verdict(found: dict[str, Any], deployed: Path) -> None:
    text = (deployed / "bundle" / "report.md").read_text(encoding="utf-8")
    assert text == render(found)
    lines = text.splitlines()
    assert lines[0] == "# Deployment report"
    assert lines[2].startswith("**Passed: all 5 checks")
    headings = [line for line in lines if line.startswith("## ")]
    assert headings == [
        "## Size",
        "## Accuracy",
        "## Latency",
        "## Chain of proof",
        "## Not run",
        "## Environment",
    ]


def test_every_table_row_has_as_many_cells_as_its_head(found: dict[str, Any]) -> None:
    for block in render(found).split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_a_failed_check_leads(found: dict[str, Any]) -> None:
    found["checks"][0]["passed"] = False
    assert verdict_line(found).startswith("FAILED: parity-gated-compact (1 of 5")
    assert "**FAILED: parity-gated-compact" in render(found)


def test_what_was_not_run_is_said(found: dict[str, Any]) -> None:
    found["not_run"] = [{"what": "accuracy against something", "why": "there was none"}]
    found["accuracy"].update(baseline=None, drop=None)
    text = render(found)
    assert "- accuracy against something: there was none" in text
    assert "not run: accuracy against something" in verdict_line(found)
    assert "| trained baseline (torch) | not measured |" in text


def test_few_runs_and_a_cold_machine_are_said(found: dict[str, Any]) -> None:
    found["latency"][0].update(p99_reliable=False, warm=False)
    found["parity"][1].update(max_abs=None, relative=None)
    text = render(found)
    assert "p99 is unreliable" in text
    assert "did not become flat" in text
    assert "not finite" in text
