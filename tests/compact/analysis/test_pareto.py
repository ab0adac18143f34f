"""The knee, the selection of a point, and the plot."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
from PIL import Image
from rich.console import Console

from eps_compact.analysis.sweep import (
    ClassLoss,
    Goal,
    Point,
    Sweep,
    class_table,
    knee,
    pick,
    table,
)
from eps_compact.plots import draw_pareto
from eps_core.errors import ConfigError
from eps_core.stats import Interval

ACCURACIES = (0.98, 0.98, 0.97, 0.95, 0.60, 0.10)


def point(index: int) -> Point:
    accuracy = ACCURACIES[index]
    drop = 100 * (ACCURACIES[0] - accuracy)
    parameters = 900 - 160 * index
    return Point(
        removed=tuple(f"stages.2.{i}" for i in range(index)),
        parameters=parameters,
        flops=1000 * (9 - index),
        parameters_share=parameters / 1000,
        flops_share=(9 - index) / 10,
        latency_share=Interval(0.8 - 0.1 * index, 0.7 - 0.1 * index, 0.9 - 0.1 * index),
        latency_predicted=0.82 - 0.1 * index,
        accuracy=accuracy,
        loss=2 - accuracy,
        drop=Interval(drop, drop - 1, drop + 1),
        ms=Interval(3 - 0.5 * index, 2.9 - 0.5 * index, 3.1 - 0.5 * index),
        speedup=Interval(3 / (3 - 0.5 * index), 1.0, 9.0),
    )


SWEEP = Sweep(
    nested=False,
    points=tuple(point(i) for i in range(6)),
    knee=3,
    weight="parameters",
    chosen_on=400,
    measured_on=600,
    timer="a clock",
    seconds=1.0,
)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([(10, 0.9), (8, 0.9), (6, 0.88), (4, 0.5), (2, 0.1)], 2),
        ([(10, 0.9), (8, 0.5), (6, 0.2), (4, 0.1)], 0),  # falls at once: every point is below
        ([(10, 0.9), (5, 0.9), (1, 0.9)], 2),  # costs nothing: the smallest
        ([(10, 0.9), (10, 0.1)], 0),  # saves nothing
        ([(10, 0.9)], 0),
    ],
)
def test_the_knee(curve: list[tuple[float, float]], expected: int) -> None:
    assert knee(curve) == expected


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        ({"target_parameters": 0.95}, 0),  # the dead blocks alone were enough
        ({"target_parameters": 0.6}, 2),
        ({"target_flops": 0.75}, 2),
        ({"target_parameters": 0.6, "target_flops": 0.65}, 3),
        ({"target_latency": 0.71}, 1),
        ({"target_speedup": 1.6}, 2),
        ({"target_parameters": 0.6, "target_latency": 0.45}, 4),
        ({"max_accuracy_drop": 0.0}, 1),
        ({"max_accuracy_drop": 1.0}, 2),
        ({"max_accuracy_drop": 3.0}, 3),
        ({"target_parameters": 0.6, "max_accuracy_drop": 3.0}, 2),
    ],
)
def test_the_point_that_meets_what_is_asked(wanted: dict[str, float], index: int) -> None:
    goal = Goal(**wanted)
    assert pick(SWEEP, goal) == SWEEP.points[index]
    said = goal.describe(SWEEP.points[index])
    assert all(f"--{name.replace('_', '-')} {value:g}" in said for name, value in wanted.items())
    assert f"found {SWEEP.points[index].parameters_share:.1%} of the parameters" in said


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "nothing to select by: give --target-parameters, .*--target-speedup or"),
        ({"target_parameters": 1.5}, r"^--target-parameters 1\.5: must be between 0 and 1"),
        ({"target_flops": 0.0}, r"^--target-flops 0: must be between 0 and 1"),
        ({"max_accuracy_drop": -1.0}, r"^--max-accuracy-drop -1: must be 0 to 100 points"),
        (
            {"target_parameters": 0.05},
            r"^--target-parameters 0\.05: the smallest network of the sweep keeps 10\.0% of the"
            r" parameters, as every stage keeps a block; ask for at least 0\.1$",
        ),
        ({"target_speedup": 1.0}, r"^--target-speedup 1: must be finite and above 1$"),
        ({"target_speedup": float("nan")}, r"^--target-speedup nan: must be finite and above 1$"),
        (
            {"target_latency": 0.2},
            r"^--target-latency 0\.2: the smallest network of the sweep keeps 30\.0% of the"
            r" latency, as every stage keeps a block; ask for at least 0\.301$",
        ),
        ({"target_speedup": 5}, r"^--target-speedup 5: .* 30\.0% .*; ask for at most 3\.333$"),
        ({"target_flops": 0.05}, r"keeps 40\.0% of the FLOPs, .* at least 0\.4$"),
        (
            {"target_parameters": 0.3, "max_accuracy_drop": 1.0},
            r"^--max-accuracy-drop 1: no network .* least drop among them is 38\.00 points, at"
            r" 26\.0% of the parameters",
        ),
    ],
)
def test_what_no_point_has_is_refused(wanted: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        pick(SWEEP, Goal(**wanted))
    assert "\n" not in str(caught.value)


def test_targets_that_no_point_meets_together_are_refused() -> None:
    """Each share alone is met by some point, but here not by the same one."""
    points = (
        replace(SWEEP.points[0], parameters_share=0.5, flops_share=0.9),
        replace(SWEEP.points[1], parameters_share=0.4, flops_share=0.8),
    )
    with pytest.raises(ConfigError, match=r"^--target-flops 0\.7: the smallest"):
        pick(replace(SWEEP, points=points), Goal(target_parameters=0.45, target_flops=0.7))


@pytest.mark.parametrize(
    ("goal", "place"),
    [
        (Goal(target_parameters=0.6), 2),  # between the last that is too large and the first
        (Goal(target_parameters=0.95), None),  # the dead blocks alone are enough
        (Goal(target_parameters=0.05), None),  # too small for the curve
        (Goal(max_accuracy_drop=1.0), 3),  # beyond the smallest that keeps the limit
        (Goal(max_accuracy_drop=99.0), None),
        (Goal(target_parameters=0.6, max_accuracy_drop=3.0), 2),
        (Goal(target_parameters=0.3, max_accuracy_drop=1.0), 4),  # small enough, and too bad
    ],
)
def test_the_step_that_passes_a_goal(goal: Goal, place: int | None) -> None:
    assert goal.overshoot(SWEEP.points) == place


def test_the_class_that_lost_most_at_each_point() -> None:
    cat = ClassLoss(name="cat", samples=12, drop=Interval(25.0, 3.0, 51.0))
    points = (SWEEP.points[0], replace(SWEEP.points[1], worst=cat), SWEEP.points[2])
    found = replace(SWEEP, points=points)
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(class_table(found))
    lines = console.export_text().splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert rows == [["1", "cat", "12", "+25.0 (+3.0..+51.0)"], ["2", "none", "", ""]]
    assert found.to_dict()["points"][1]["worst"]["name"] == "cat"
    assert found.to_dict()["points"][2]["worst"] is None


def test_a_latency_is_told_as_asked_predicted_and_measured() -> None:
    said = Goal(target_speedup=1.6).describe(SWEEP.points[2])
    assert said == (
        "asked for --target-speedup 1.6; found 58.0% of the parameters and 70.0% of the FLOPs,"
        " 60.0% of the latency measured (62.0% predicted), +1.0 points lost, 2 live blocks removed"
    )


def test_until_it_is_measured_a_latency_is_the_predicted_one() -> None:
    nothing = Interval(math.nan, math.nan, math.nan)
    goal = Goal(target_latency=0.61)
    assert goal.small_enough(SWEEP.points[2])
    assert not goal.small_enough(replace(SWEEP.points[2], latency_share=nothing))


def test_as_data_and_as_a_table() -> None:
    plain = json.loads(json.dumps(SWEEP.to_dict(), allow_nan=False))
    assert plain["points"][2]["removed"] == ["stages.2.0", "stages.2.1"]
    assert "straight line" in plain["knee_rule"]
    console = Console(file=io.StringIO(), width=120)
    console.print(table(SWEEP))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "3: stages.2.2 ◄ knee" in text
    assert "dead blocks only" in text


@pytest.mark.parametrize("selected", [None, SWEEP.points[2]])
def test_the_plot_is_an_image(selected: Point | None) -> None:
    with Image.open(io.BytesIO(draw_pareto(SWEEP, "digits", selected))) as image:
        assert image.format == "PNG"
        assert image.width > 1000


def test_a_sweep_of_a_single_point_can_be_drawn() -> None:
    assert draw_pareto(replace(SWEEP, points=SWEEP.points[:1], knee=0), "digits")
