"""Charts of report.html: what they show, read from the produced SVG, and the blocks by stage."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eps_deploy.report.formatting import number_ranges, stage_strips
from eps_deploy.report.render import class_chart, drop_chart, speedup_chart, times_chart
from eps_deploy.report.schema import parse
from tests.deploy.report.reports import deep, deferred, make_report, on_a_gpu, without_baseline

POINTS = st.floats(min_value=-100, max_value=100).map(lambda value: round(value, 3))


class Chart:
    """A chart's lines, areas and texts by their class."""

    def __init__(self, svg: str | None) -> None:
        assert svg is not None
        self.root = ElementTree.fromstring(svg)
        self.width = float(self.root.attrib["viewBox"].split()[2])

    def _of(self, kind: str, tag: str) -> list[ElementTree.Element]:
        groups = [g for g in self.root.iter("g") if kind in g.get("class", "").split()]
        return [element for group in groups for element in group.iter(tag)]

    def texts(self, kind: str) -> list[str]:
        return [element.text or "" for element in self._of(kind, "text")]

    def spans(self, kind: str) -> list[tuple[float, float]]:
        """Left and right end of each line or area."""
        found = []
        for element in self._of(kind, "path"):
            numbers = [float(n) for n in re.findall(r"[-.\d]+", element.attrib["d"])]
            found.append((min(numbers[::2]), max(numbers[::2])))
        return found


def drop(found: dict[str, Any]) -> Chart:
    return Chart(drop_chart(parse(found)))


def by_class(found: dict[str, Any]) -> Chart:
    return Chart(class_chart(parse(found)))


def speedups(found: dict[str, Any]) -> Chart:
    return Chart(speedup_chart(parse(found)))


@settings(max_examples=15)
@given(st.lists(POINTS, min_size=3, max_size=3).map(sorted))
def test_a_scale_holds_its_values_in_order_between_few_ticks(values: list[float]) -> None:
    found = make_report()
    found["accuracy"]["drop"].update(zip(("low", "points", "high"), values, strict=True))
    chart = drop(found)
    ticks = [float(text.replace("−", "-")) for text in chart.texts("tick")]
    assert 2 <= len(ticks) <= 12
    assert ticks == sorted(set(ticks))
    assert ticks[0] <= values[0] <= values[-1] <= ticks[-1]
    (whole,) = chart.spans("range")
    (middle, _) = chart.spans("dot")[0]
    assert 0 < whole[0] <= middle <= whole[1] < chart.width


def test_ticks_are_round() -> None:
    assert drop(make_report()).texts("tick") == ["−0.2", "0", "0.2", "0.4", "0.6", "0.8"]


def test_the_drop_is_between_its_ends_and_the_limit_where_it_belongs() -> None:
    chart = drop(make_report())
    ((low, high),) = chart.spans("range")
    places = [low, *(chart.spans(kind)[0][0] for kind in ("zero", "dot", "goal")), high]
    assert places == sorted(set(places))
    assert chart.texts("goal") == ["limit 0.5"]
    assert chart.spans("beyond")[0][0] == chart.spans("goal")[0][0]


def test_a_limit_far_away_does_not_squeeze_the_interval() -> None:
    chart = drop(make_report(limit=100))
    assert chart.spans("goal") == chart.spans("beyond") == []
    ((low, high),) = chart.spans("range")
    assert high - low > 0.5 * chart.width


def test_nothing_to_draw() -> None:
    assert drop_chart(parse(without_baseline())) is None
    assert speedup_chart(parse(deferred())) is None


def test_each_class_has_its_interval() -> None:
    chart = by_class(make_report(classes=["a", "b" * 50], lost=50, won=0))
    for (low, high), (dot, _) in zip(chart.spans("range"), chart.spans("dot"), strict=True):
        assert low < dot <= high
    assert len(chart.spans("range")) == 2
    assert chart.texts("label")[0].startswith("a: +0.50 (")
    assert chart.texts("label")[1].startswith("b" * 31 + "…: ")
    assert chart.spans("goal") == chart.spans("whisker") == []
    assert len(chart.spans("reported")) == 2 * 4
    assert class_chart(parse(without_baseline())) is None


@pytest.mark.parametrize(
    ("lost", "limit", "tone"), [(9000, 20.0, "failed"), (0, 20.0, "passed"), (450, 5.0, "waiting")]
)
def test_a_class_is_judged_by_the_end_of_its_thin_line(lost: int, limit: float, tone: str) -> None:
    found = make_report(classes=["a", "b"], lost=lost, won=0, samples=9000, class_limit=limit)
    chart = by_class(found)
    assert len(chart.spans(tone)) == 2 * 4
    goal, _ = chart.spans("goal")[0]
    for left, right in chart.spans("whisker"):
        assert left < right
        assert (left > goal) == (tone == "failed")


def test_the_ratio_of_the_flops_and_the_goal_are_drawn() -> None:
    chart = speedups(on_a_gpu())
    assert [chart.texts(kind) for kind in ("goal", "flops", "one")] == [
        ["goal 2"],
        ["FLOPs 2.38"],
        ["1: as fast"],
    ]
    places = [chart.spans(kind)[0][0] for kind in ("one", "goal", "flops")]
    assert places == sorted(places)
    assert chart.texts("label") == [
        "batch 1, call of the engine",
        "batch 1, image to label",
        "batch 1, GPU alone",
        "batch 16, call of the engine",
    ]
    assert len(chart.spans("range")) == len(chart.spans("dot")) == 4


@pytest.mark.parametrize("goal", [0.0, 1.0, 1000.0])
def test_a_goal_of_one_or_far_away_is_not_drawn_again(goal: float) -> None:
    chart = speedups(make_report(goal=goal))
    assert chart.spans("goal") == []
    assert chart.texts("goal") == []
    assert len(chart.spans("flops")) == len(chart.spans("one")) == 1
    assert float(chart.texts("tick")[-1]) < 5


def test_a_long_tail_leaves_room_for_the_medians() -> None:
    found = make_report()
    found["latency"][0]["baseline_ms"]["p99"] = 40.0
    entry = parse(found).latency[0]
    chart = Chart(times_chart(entry, "call of the engine", entry))
    assert chart.texts("tick")[-1] == "p99 40.00 →"
    assert float(chart.texts("tick")[-2]) < 40
    left, right = chart.spans("unpruned")[0]
    assert right - left > 0.2 * chart.width


def test_the_strips_hold_every_block_in_order() -> None:
    strips = stage_strips(parse(deep()))
    assert [(strip.name, len(strip.blocks), strip.alive) for strip in strips] == [
        ("stages.0", 125, 50),
        ("stages.1", 125, 50),
        ("stages.2", 125, 50),
    ]
    assert strips[0].names.startswith("0, 3, 5")
    states = [block.state for block in strips[0].blocks[:5]]
    assert states == ["alive", "removed", "removed", "alive", "removed"]


def test_runs_of_numbers_are_shortened() -> None:
    assert number_ranges(["0", "1", "2", "7"]) == "0–2, 7"
    assert number_ranges(["conv", "1", "2"]) == "conv, 1–2"
    assert number_ranges([]) == "none"
