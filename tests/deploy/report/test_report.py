"""Checks, their wording and the verdict; `report.json` and its schema."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from eps_core.checks import Check
from eps_core.stats import Interval
from eps_deploy.bench.accuracy import Correct
from eps_deploy.report import report
from eps_deploy.report.render import verdict_line
from eps_deploy.report.report import accuracy_check
from eps_deploy.report.schema import json_schema, parse
from tests.deploy.report.reports import PROVOKED, latency, make_report, parity

SCHEMA = json_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
PARITY = parity("compact-onnx", 0.01, 0.02)
LATENCY = latency(1, 2.0, Interval(2.0, 1.8, 2.2))


def problems(found: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(found)]


def outcomes(total: int, wrong: Iterable[int]) -> Correct:
    right = np.ones(total, dtype=bool)
    right[list(wrong)] = False
    return right


def dropped(lost: int, total: int) -> Check:
    return accuracy_check(outcomes(total, []), outcomes(total, range(lost)), limit=0.5)[0]


def checked(stage: Any) -> Check:
    check = report.parity_check(stage)
    assert check is not None
    return check


def test_parity_check() -> None:
    check = checked(PARITY)
    assert (check.name, check.passed, check.value, check.limit) == (
        "parity-compact-onnx",
        True,
        0.01,
        0.02,
    )
    assert not checked(replace(PARITY, limit=0.001)).passed
    assert "not finite" in checked(replace(PARITY, max_abs=None, relative=None)).detail
    assert "differ by 0.5" in checked(replace(PARITY, max_abs=0.5, limit=0.0)).detail
    assert "equal to the last bit" in checked(replace(PARITY, relative=0.0, limit=0.0)).detail


def test_a_stage_without_a_limit_is_reported_and_not_judged() -> None:
    stage = replace(PARITY, limit=None)
    assert report.parity_check(stage) is None
    entry = report.parity_entry(stage)
    assert (entry["relative"], entry["limit"], entry["passed"]) == (0.01, None, None)


def test_accuracy_check_says_when_there_are_too_few_images() -> None:
    few, many = dropped(0, 359), dropped(0, 10_000)
    assert (few.passed, few.conclusive, many.passed, many.conclusive) == (True, False, True, True)
    assert "too few images to tell" in few.detail
    assert "too few" not in many.detail
    assert "on 10,000 images" in many.detail


def test_there_is_no_minus_before_nothing() -> None:
    check, drop = accuracy_check(outcomes(1564, range(3)), outcomes(1564, range(3, 13)), limit=0.5)
    assert -0.005 < drop.low < 0
    assert "interval of the drop +0.00 to" in check.detail


def test_accuracy_check_says_which_way() -> None:
    assert "1.00 points below the baseline" in dropped(10, 1000).detail
    assert not dropped(10, 1000).passed


def test_the_drop_is_paired() -> None:
    """Two images lost, one gained, of 400: half a point less one quarter."""
    check, drop = accuracy_check(outcomes(400, [0]), outcomes(400, [1, 2]), limit=0.5)
    assert (drop.only_baseline_right, drop.only_engine_right) == (2, 1)
    assert drop.points == check.value == pytest.approx(0.25)
    assert drop.low < 0 < drop.points < drop.high


def test_images_that_both_get_wrong_do_not_count() -> None:
    both = list(range(50))
    some, none = (accuracy_check(outcomes(400, w), outcomes(400, w), 0.5) for w in (both, []))
    assert some == none


def test_few_images_pass_without_being_conclusive() -> None:
    """With equal answers on 359 images the drop might still be 1.06 points."""
    check, drop = accuracy_check(outcomes(359, []), outcomes(359, []), limit=0.5)
    assert check.passed
    assert not check.conclusive
    assert not drop.conclusive
    assert drop.high == pytest.approx(1.06, abs=0.005)


def test_many_images_are_conclusive() -> None:
    check, drop = accuracy_check(outcomes(10_000, []), outcomes(10_000, []), limit=0.5)
    assert check.passed
    assert check.conclusive
    assert drop.conclusive


def test_a_drop_above_the_limit_fails_even_if_it_may_be_chance() -> None:
    check, drop = accuracy_check(outcomes(359, []), outcomes(359, [7, 8]), limit=0.5)
    assert drop.points == pytest.approx(200 / 359)
    assert not check.passed
    assert not check.conclusive


def test_a_large_drop_fails_for_sure() -> None:
    check, _ = accuracy_check(outcomes(359, []), outcomes(359, list(range(40))), limit=0.5)
    assert not check.passed
    assert check.conclusive


def test_a_drop_of_exactly_the_limit_passes() -> None:
    assert accuracy_check(outcomes(200, []), outcomes(200, [3]), limit=0.5)[0].passed
    assert accuracy_check(outcomes(1000, []), outcomes(1000, [1, 2, 3]), limit=0.3)[0].passed


def test_a_better_engine_passes_a_limit_of_zero() -> None:
    assert accuracy_check(outcomes(100, [1, 2]), outcomes(100, [1]), limit=0.0)[0].passed


def test_the_speedup_s_lower_end_is_judged() -> None:
    assert report.speedup_check(LATENCY, 1.8).passed
    near = report.speedup_check(LATENCY, 1.9)
    assert (near.passed, near.conclusive, near.value) == (False, False, 1.8)
    far = report.speedup_check(LATENCY, 3.0)
    assert (far.passed, far.conclusive) == (False, True)


def test_a_machine_too_busy_leaves_the_speedup_in_doubt() -> None:
    starved = replace(LATENCY, conditions=replace(LATENCY.conditions, waited=0.5))
    check = report.speedup_check(starved, 1.0)
    assert (check.passed, check.conclusive) == (True, False)
    assert "too busy" in check.detail
    found = make_report(timings=[starved])
    assert "the machine was too busy to be sure: speedup" in verdict_line(found)


def test_the_verdict() -> None:
    good, bad = checked(PARITY), checked(replace(PARITY, limit=0.001))
    assert report.verdict([good]) is True
    assert report.verdict([good], deferred=True) is None
    assert report.verdict([good, bad], deferred=True) is False
    assert report.verdict([]) is None


def test_what_became_of_each_block() -> None:
    names = ["layer1.0", "layer1.1", "layer2.0"]
    entry = report.blocks_entry(names, {"layer2.0", "layer1.0"}, ["layer2.0"])
    assert (entry["baseline"], entry["compact"]) == (3, 1)
    assert entry["removed"] == ["layer1.0", "layer2.0"]
    assert [(block["stage"], block["state"]) for block in entry["map"]] == [
        ("layer1", "dead"),
        ("layer1", "alive"),
        ("layer2", "removed"),
    ]


def test_no_nan_gets_into_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_json(tmp_path / "report.json", {**make_report(), "command": float("nan")})
    assert not (tmp_path / "report.json").exists()


def test_the_environment_names_versions_and_not_the_machine() -> None:
    found = report.environment({"name": "ort", "threads": 1})
    assert found["engine"] == {"name": "ort", "threads": 1}
    assert found["packages"]["numpy"] == np.__version__
    assert set(found) == {"engine", "packages", "python", "system", "processor", "cores"}


def test_the_schema_is_valid_and_printed() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema"]["enum"] == [report.SCHEMA]
    command = [sys.executable, "-m", "eps_deploy.report.schema"]
    assert json.loads(subprocess.check_output(command)) == SCHEMA


def parts(schema: dict[str, Any], where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema of a value within `schema`, with its path."""
    for name, inner in schema.get("properties", {}).items():
        yield f"{where}.{name}", inner
        yield from parts(inner, f"{where}.{name}")
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield f"{where}[]", schema[name]
            yield from parts(schema[name], f"{where}[]")
    for choice in schema.get("anyOf", []):
        yield f"{where}?", {"description": "of the property", **choice}
        yield from parts(choice, where)


def test_every_key_is_described_and_every_number_has_a_unit() -> None:
    roots = {"": SCHEMA, **SCHEMA["$defs"]}
    assert all(root["description"] for root in roots.values())
    found = [part for name, root in roots.items() for part in parts(root, name)]
    assert len(found) > 100
    described = [part.get("description") or part.get("$ref") for _, part in found]
    assert all(described), found[described.index(None)]
    numbers = [(where, part) for where, part in found if part.get("type") in ("number", "integer")]
    assert len(numbers) > 50
    assert [where for where, part in numbers if not part.get("unit")] == []


@pytest.mark.parametrize("kind", sorted(PROVOKED))
def test_reports_follow_the_schema(kind: str) -> None:
    found = PROVOKED[kind]()
    assert problems(found) == []
    assert parse(found).checks == parse(json.loads(json.dumps(found))).checks


def test_a_real_report_follows_the_schema(deployed: Path) -> None:
    found = json.loads((deployed / "bundle" / "report.json").read_bytes())
    assert problems(found) == []
    assert found["passed"] is True


def test_what_does_not_follow_the_format_is_rejected(tmp_path: Path) -> None:
    """By the schema for other programs, and before `report.json` is written."""
    wrong = make_report()
    wrong["latency"][0]["baseline_ms"]["p50"] = "fast"
    incomplete = {key: value for key, value in make_report().items() if key != "not_run"}
    for found in ({**make_report(), "surprise": 1}, incomplete, wrong):
        assert problems(found)
        with pytest.raises(ValueError, match=r"surprise|not_run|p50"):
            report.write_json(tmp_path / "report.json", found)
    assert list(tmp_path.iterdir()) == []


def test_the_whole_of_a_latency_is_in_the_report() -> None:
    entry = report.latency_entry(LATENCY)
    assert entry["speedup"] == {"median": 2.0, "low": 1.8, "high": 2.2}
    assert entry["throughput"] == {"baseline": 500.0, "compact": 1000.0}
    assert (entry["blocks"], entry["runs_per_block"], entry["p99_reliable"]) == (20, 200, True)
    assert entry["conditions"] == asdict(LATENCY)["conditions"]
    assert (entry["end_to_end"], entry["device"]) == (None, None)
