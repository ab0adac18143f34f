"""Scales and positions of the page's figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eps_deploy.report.render import (
    axis,
    drop_figure,
    ranges,
    ratio_figure,
    render_html,
    stage_strips,
    times_figures,
)
from tests.deploy.reporting.reports import deep, deferred, make_report, on_a_gpu, without_baseline

VALUES = st.floats(min_value=-1e6, max_value=1e6).map(lambda value: round(value, 6))


@given(st.lists(VALUES, min_size=1, max_size=6))
def test_a_scale_holds_its_values_in_order_between_few_ticks(values: list[float]) -> None:
    scale = axis(values)
    assert 2 <= len(scale.ticks) <= 12
    assert list(scale.ticks) == sorted(set(scale.ticks))
    places = [scale.at(value) for value in sorted(values)]
    assert places == sorted(places)
    assert 0 < scale.at(scale.low) <= places[0] <= places[-1] <= scale.at(scale.high) < 100


def test_ticks_are_round() -> None:
    assert [axis([0, 0.77]).label(tick) for tick in axis([0, 0.77]).ticks] == [
        "0",
        "0.2",
        "0.4",
        "0.6",
        "0.8",
    ]
    assert axis([-0.03, 0.1]).label(-0.05) == "−0.05"


def test_the_drop_stands_between_its_ends_and_the_limit_where_it_belongs() -> None:
    figure = drop_figure(make_report())
    assert figure is not None
    assert figure.limit == 0.5
    at = figure.axis.at
    assert at(figure.low) < at(0) < at(figure.points) < at(figure.limit) < at(figure.high)


def test_a_limit_far_away_does_not_squeeze_the_interval() -> None:
    figure = drop_figure(make_report(limit=100))
    assert figure is not None
    assert figure.limit is None
    assert figure.axis.width(figure.low, figure.high) > 50


def test_nothing_to_draw() -> None:
    assert drop_figure(without_baseline()) is None
    assert ratio_figure(deferred()) is None
    assert times_figures(deferred()) == []


def test_the_ratio_of_the_flops_and_the_goal_are_drawn() -> None:
    figure = ratio_figure(on_a_gpu())
    assert figure is not None
    assert [(kind, round(value, 2)) for kind, _, value in figure.lines] == [
        ("goal", 2.0),
        ("flops", 2.38),
        ("one", 1.0),
    ]
    assert [title for title, _, _ in figure.rows] == [
        "batch 1, call of the engine",
        "batch 1, picture to label",
        "batch 1, GPU alone",
        "batch 16, call of the engine",
    ]


@pytest.mark.parametrize("goal", [0.0, 1.0, 1000.0])
def test_a_goal_of_one_or_far_away_is_not_drawn_again(goal: float) -> None:
    figure = ratio_figure(make_report(goal=goal))
    assert figure is not None
    assert [kind for kind, _, _ in figure.lines] == ["flops", "one"]
    assert figure.axis.high < 5


def test_a_long_tail_leaves_room_for_the_medians() -> None:
    found = make_report()
    found["latency"][0]["baseline_ms"]["p99"] = 40.0
    figure = times_figures(found)[0]
    assert figure.axis.high < 40
    assert figure.axis.width(0, found["latency"][0]["baseline_ms"]["p50"]) > 20
    assert "p99 40.00 →" in render_html(found)


def test_the_strips_hold_every_block_in_order() -> None:
    strips = stage_strips(deep())
    assert [(strip.name, len(strip.blocks), strip.alive) for strip in strips] == [
        ("stages.0", 125, 50),
        ("stages.1", 125, 50),
        ("stages.2", 125, 50),
    ]
    assert strips[0].names.startswith("0, 3, 5")
    states = [block["state"] for block in strips[0].blocks[:5]]
    assert states == ["alive", "removed", "removed", "alive", "removed"]


def test_runs_of_numbers_are_shortened() -> None:
    assert ranges(["0", "1", "2", "7"]) == "0–2, 7"
    assert ranges(["conv", "1", "2"]) == "conv, 1–2"
    assert ranges([]) == "none"
