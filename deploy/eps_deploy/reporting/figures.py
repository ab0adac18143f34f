"""Where things stand in the figures of `report.html`: axes, and positions in per cent of the width.

Positions are per cent of the figure's width, so that a figure fits any screen while its text keeps
its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from eps_deploy.reporting.words import Report, comparisons

_MARGIN = 4.0  # per cent at both ends, which the text of the outermost ticks needs
_TICKS = 5
_STEPS = (1, 2, 2.5, 5, 10)
_TAIL = 3.0  # times the longer median: what lies beyond would leave no room for the medians
_FAR = 3.0  # a limit is drawn up to so many times the span of what was measured


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale from `low` to `high` with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Place of `value` in per cent of the width; what lies outside goes to the nearer end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(_MARGIN + share * (100 - 2 * _MARGIN), 3)

    def width(self, low: float, high: float) -> float:
        return round(self.at(high) - self.at(low), 3)

    def anchor(self, value: float) -> str:
        """Of a text at `value`: away from the nearer edge."""
        place = self.at(value)
        return "start" if place < 25 else "end" if place > 75 else "middle"

    def label(self, tick: float) -> str:
        return f"{tick:.6g}".replace("-", "−")


def axis(values: Iterable[float]) -> Axis:
    """A scale that holds all `values`, with about five ticks at round numbers."""
    found = list(values)
    low, high = min(found), max(found)
    if high - low < 1e-9 * max(abs(high), 1e-9):
        low, high = low - max(abs(low) / 2, 0.5), high + max(abs(high) / 2, 0.5)
    step = _step((high - low) / (_TICKS - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(index * step, 12) + 0.0 for index in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def _step(rough: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in _STEPS if step * power >= 0.8 * rough)


@dataclass(frozen=True, kw_only=True, slots=True)
class DropFigure:
    """The drop in accuracy against its limit, in percentage points.

    Attributes:
        limit: None when it lies too far from what was measured to be drawn.
    """

    axis: Axis
    points: float
    low: float
    high: float
    limit: float | None


def drop_figure(report: Report) -> DropFigure | None:
    """None when there is no drop to draw."""
    drop = report["accuracy"]["drop"]
    if drop is None:
        return None
    measured = [0.0, drop["points"], drop["low"], drop["high"]]
    span = max(measured) - min(measured)
    limit: float | None = report["goals"]["max_accuracy_drop"]
    assert limit is not None
    if limit > max(measured) + _FAR * max(span, 0.05):
        limit = None
    return DropFigure(
        axis=axis([*measured, *([] if limit is None else [limit])]),
        points=drop["points"],
        low=drop["low"],
        high=drop["high"],
        limit=limit,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TimesFigure:
    """Times of both networks for one batch size and one way of timing.

    Percentiles may lie beyond the axis: they are named at its end.
    """

    batch: int
    title: str
    reliable: bool
    axis: Axis
    rows: tuple[tuple[str, Mapping[str, float]], ...]


def times_figures(report: Report) -> list[TimesFigure]:
    figures = []
    for entry in report["latency"]:
        for title, found in comparisons(entry):
            rows = (("unpruned", found["baseline_ms"]), ("compact", found["compact_ms"]))
            longest = max(max(times.values()) for _, times in rows)
            median = max(times["p50"] for _, times in rows)
            figures.append(
                TimesFigure(
                    batch=entry["batch"],
                    title=title,
                    reliable=entry["p99_reliable"],
                    axis=axis([0.0, min(longest, _TAIL * median)]),
                    rows=rows,
                )
            )
    return figures


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioFigure:
    """Speed-ups with their intervals on one scale, with the ratio of the FLOPs.

    Attributes:
        lines: kind (`one`, `flops`, `goal`), text and value of what the speed-ups are held against;
            those that lie too far away to be drawn are left out.
        rows: title, interval, verdict.
    """

    axis: Axis
    lines: tuple[tuple[str, str, float], ...]
    rows: tuple[tuple[str, Mapping[str, float], str], ...]


def ratio_figure(report: Report) -> RatioFigure | None:
    """None when no latency was measured."""
    rows = tuple(
        (f"batch {entry['batch']}, {title}", found["speedup"], found["verdict"])
        for entry in report["latency"]
        for title, found in comparisons(entry)
    )
    if not rows:
        return None
    measured = [1.0, *(speedup[end] for _, speedup, _ in rows for end in ("low", "high"))]
    farthest = max(measured) + _FAR * (max(measured) - min(measured)) + 0.1
    lines = [("one", "1: as fast", 1.0)]
    flops = report["flops"]["baseline"] / max(report["flops"]["compact"], 1)
    if flops <= farthest:
        lines.append(("flops", f"FLOPs {flops:.2f}", flops))
    goal = report["goals"]["min_speedup"]
    if 0 < goal <= farthest and goal != 1:  # a goal of 1 is drawn anyway
        lines.append(("goal", f"goal {goal:g}", goal))
    values = [*measured, *(value for _, _, value in lines)]
    return RatioFigure(axis=axis(values), lines=tuple(reversed(lines)), rows=rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStrip:
    """The blocks of one stage in the order of computation.

    Attributes:
        blocks: `name`, `state`, and whether `kept` in higher precision.
        names: of those that are computed, shortened: `0–3, 7`.
    """

    name: str
    blocks: tuple[Mapping[str, Any], ...]
    alive: int
    names: str


def stage_strips(report: Report) -> list[StageStrip]:
    higher = set(report["precision"]["kept"])
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for block in report["blocks"]["map"]:
        marked = {**block, "kept": block["name"] in higher}
        stages.setdefault(block["stage"], []).append(marked)
    strips = []
    for name, blocks in stages.items():
        alive = [block["name"].removeprefix(f"{name}.") for block in blocks if _alive(block)]
        strips.append(
            StageStrip(name=name, blocks=tuple(blocks), alive=len(alive), names=ranges(alive))
        )
    return strips


def _alive(block: Mapping[str, Any]) -> bool:
    return bool(block["state"] == "alive")


def ranges(names: list[str]) -> str:
    """`0–3, 7` for ["0", "1", "2", "3", "7"]; names that are no numbers stand for themselves."""
    if not names:
        return "none"
    parts: list[tuple[str, str]] = []
    for name in names:
        follows = (parts and name.isdecimal() and parts[-1][1].isdecimal()) and int(name) == int(
            parts[-1][1]
        ) + 1
        if follows:
            parts[-1] = (parts[-1][0], name)
        else:
            parts.append((name, name))
    return ", ".join(first if first == last else f"{first}–{last}" for first, last in parts)
