"""report.md: the report as text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eps_deploy.report.render import render_markdown, verdict_line
from tests.deploy.report.reports import (
    HOSTILE,
    PROVOKED,
    deferred,
    failed,
    make_report,
    without_baseline,
)


def test_the_bundle_s_text_is_that_of_its_data(deployed: Path) -> None:
    found = json.loads((deployed / "bundle" / "report.json").read_bytes())
    assert (deployed / "bundle" / "report.md").read_text(encoding="utf-8") == render_markdown(found)


def test_the_verdict_comes_first() -> None:
    lines = render_markdown(make_report()).splitlines()
    assert lines[0] == "# Deployment report"
    assert lines[2].startswith("**Passed: all 5 checks")
    assert [line for line in lines if line.startswith("## ")] == [
        "## Size",
        "## Accuracy",
        "## Classes",
        "## Changed answers",
        "## Latency",
        "## Blocks",
        "## Parity",
        "## Precision",
        "## Not run",
        "## Environment",
    ]


@pytest.mark.parametrize("kind", sorted(PROVOKED))
def test_every_table_row_has_as_many_cells_as_its_head(kind: str) -> None:
    tables = [
        block for block in render_markdown(PROVOKED[kind]()).split("\n\n") if block.startswith("|")
    ]
    assert len(tables) >= 4
    for table in tables:
        bars = {line.replace("\\|", "").count("|") for line in table.splitlines()}
        assert len(bars) == 1, table


def test_a_failed_check_leads() -> None:
    found = failed()
    line = verdict_line(found)
    assert line.startswith("FAILED: parity-compact-onnx, parity-onnx-engine, accuracy, speedup (4")
    text = render_markdown(found)
    assert "**FAILED: parity-compact-onnx" in text
    for said in (
        "not finite",
        "p99 is unreliable",
        "did not become steady",
        "slower",
        "cannot tell",
    ):
        assert said in text


def test_the_first_of_the_classes_that_fail_are_in_the_verdict() -> None:
    found = make_report(lost=900, won=0, limit=100, class_limit=1.0)
    line = verdict_line(found)
    assert line == "FAILED: class-accuracy (1 of 6 checks); classes: 0, 1, 2 and 7 more"
    assert "| class-accuracy | **FAILED** | class 0: drop +9.00 points" in render_markdown(found)


def test_too_few_images_for_every_class_is_a_doubt() -> None:
    line = verdict_line(make_report(limit=0.45, class_limit=1.0))
    assert "(too few images to be sure: accuracy, class-accuracy)" in line


def test_classes_confusions_and_changed_answers_are_told() -> None:
    text = render_markdown(make_report(lost=30, won=0))
    assert "| 0 | 1,000 | 90.70 % | 90.40 % | +0.30 (" in text
    assert "Confusions that became more frequent, 10 of 10:" in text
    assert "| 0 | 1 | 93 | 96 |" in text
    assert "| [0](changed/test-0000.png) | 0 | 0 (95.00 %) | 1 (60.00 %) |" in text
    assert text.count("](changed/") == 24
    assert "24 of them are shown, from all classes in turn" in text


def test_a_thousand_classes_stay_readable() -> None:
    found = PROVOKED["thousand"]()
    assert len(found["answers"]["classes"]) == 1000
    assert len(render_markdown(found).splitlines()) < 250


def test_a_deferred_engine_is_not_called_passed() -> None:
    line = verdict_line(deferred())
    assert line.startswith("NOT JUDGED YET: all 3 checks that could run passed")
    assert line.endswith("not run: TensorRT engine, latency")
    text = render_markdown(deferred())
    assert "| deployed engine | not measured |" in text
    assert "## Latency\n\nNot measured." in text


def test_nothing_to_judge() -> None:
    found = make_report()
    found.update(checks=[], passed=None)
    assert verdict_line(found) == "NOT JUDGED: nothing could be checked"


def test_what_was_not_run_is_said() -> None:
    text = render_markdown(without_baseline())
    assert "- accuracy against a trained baseline: no baseline.pt beside the checkpoint" in text
    assert "not run: accuracy against a trained baseline" in verdict_line(without_baseline())
    assert "| trained unpruned network (torch) | not measured |" in text


def test_names_are_no_markup() -> None:
    text = render_markdown(PROVOKED["hostile"]())
    assert "<script" not in text
    assert HOSTILE not in text
