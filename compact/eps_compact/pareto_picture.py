"""`pareto.png`: what a sweep found, accuracy against parameters and against time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eps_compact.pareto import Point, Sweep
from eps_train.picture import CLOSED, OPEN, new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GRID = "#e4e4e4"


def draw(found: Sweep, title: str, picked: Point | None = None) -> bytes:
    """Draw a sweep as PNG: on the left accuracy over parameters, on the right over milliseconds.

    The knee is marked, and so is the point that was picked. The band is the 95 % interval of the
    drop against the first point, hung from that point's accuracy.
    """
    figure = new_figure(11, 4.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    left, right = figure.subplots(1, 2, sharey=True)
    _curve(left, found, [100 * point.parameters_share for point in found.points], picked)
    left.set_xlabel("parameters, % of the network as built")
    left.set_ylabel(f"accuracy on {found.measured_on:,} held-out images, %")
    _curve(right, found, [point.ms.value for point in found.points], picked)
    right.errorbar(
        [point.ms.value for point in found.points],
        [100 * point.accuracy for point in found.points],
        xerr=[
            [point.ms.value - point.ms.low for point in found.points],
            [point.ms.high - point.ms.value for point in found.points],
        ],
        fmt="none",
        ecolor=OPEN,
        elinewidth=0.8,
    )
    right.set_xlabel(f"ms an image: {found.timer}")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower left", ncols=3)
    return png(figure)


def _curve(axes: Axes, found: Sweep, places: list[float], picked: Point | None) -> None:
    points = found.points
    start = 100 * points[0].accuracy
    accuracy = [100 * point.accuracy for point in points]
    # By place: two networks may differ in time less than the measurement does.
    order = sorted(range(len(points)), key=places.__getitem__)
    axes.fill_between(
        [places[i] for i in order],
        [max(0.0, start - points[i].drop.high) for i in order],
        [min(100.0, start - points[i].drop.low) for i in order],
        color=OPEN,
        alpha=0.13,
        linewidth=0,
        label="95 % interval of the drop",
    )
    axes.plot(places, accuracy, "o-", color=OPEN, markersize=3.5, linewidth=1.2)
    marks = [(found.points[found.knee], CLOSED, "o", f"knee: {_label(points[found.knee])}")]
    if picked is not None:
        marks.append((picked, "black", "s", f"picked: {_label(picked)}"))
    for point, color, marker, label in marks:
        index = points.index(point)
        axes.plot(
            places[index],
            accuracy[index],
            marker,
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=color,
            markeredgewidth=2,
            linestyle="none",
            label=label,
        )
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.invert_xaxis()  # the sweep goes from left to right


def _label(point: Point) -> str:
    count = len(point.removed)
    blocks = "no block" if not count else "1 block" if count == 1 else f"{count} blocks"
    return f"{blocks} out, {point.parameters_share:.1%} of the parameters, {point.accuracy:.1%}"
