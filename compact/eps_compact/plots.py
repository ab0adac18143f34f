"""Plots: the block map of a compaction, and the Pareto curve of a sweep."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from eps_compact.certificate import BlockEvidence
from eps_train.gating import rewriting
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.plots import CLOSED, DEAD, OPEN, log_scale, new_figure, png

if TYPE_CHECKING:
    from eps_compact.analysis.sweep import Point, Sweep

# -- The block map: every residual block of the network as it was built, and its state

State = Literal["alive", "sometimes closed", "dead"]
# The symbols of the training progress.
SYMBOLS: dict[State, str] = {"alive": "█", "sometimes closed": "▒", "dead": "·"}
LEGEND = "  ".join(f"{symbol} {state}" for state, symbol in SYMBOLS.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One block of the map.

    Attributes:
        name, stage: its name and the group it belongs to.
        state: `dead`: removed; `sometimes closed`: live, but its gate was closed on steps of the
            last epoch; `alive`: on none of them, or it has no gate.
        ratio: largest response on held-out images in units of epsilon, of a dead block when it was
            pruned; None without an epsilon.
    """

    name: str
    stage: str
    state: State
    ratio: float | None


def block_map(
    checkpoint: Checkpoint, live: Iterable[BlockEvidence], removed: Collection[str] = ()
) -> tuple[Block, ...]:
    """Return all blocks, in the order of computation; those of `removed` count as dead."""
    measured = {block.block: block for block in live}
    deaths = {record.block: record.death for record in checkpoint.gates}
    blocks = []
    for name in checkpoint.network.all_blocks():
        state: State = "alive"
        ratio = None
        if death := deaths.get(name):
            state, ratio = "dead", death.heldout_peak / death.epsilon
        elif name in measured:
            ratio = measured[name].ratio
            state = "sometimes closed" if measured[name].closed else "alive"
        if name in removed:
            state = "dead"
        blocks.append(Block(name=name, stage=rewriting.stage_name(name), state=state, ratio=ratio))
    return tuple(blocks)


def strip(blocks: Iterable[Block]) -> str:
    """Return the map as text: one character a block, a space between stages; see `LEGEND`."""
    return " ".join("".join(SYMBOLS[b.state] for b in members) for members in _by_stage(blocks))


def _by_stage(blocks: Iterable[Block]) -> list[list[Block]]:
    return [list(members) for _, members in groupby(blocks, key=lambda block: block.stage)]


# Dark, middle and light, so that they differ in greyscale and for colour-blind readers too.
COLORS: dict[State, str] = {"alive": OPEN, "sometimes closed": CLOSED, "dead": DEAD}
LABELS: dict[State, str] = {
    "alive": "alive",
    "sometimes closed": "alive, but closed on steps of the last epoch",
    "dead": "removed (response when it was pruned)",
}
EDGE, GRID = "#6f6f6f", "#e4e4e4"
RANGE = (0.5, 2.0)  # the least range of the logarithmic axis, in units of epsilon
OUTLINED = 150  # more bars than this are too narrow to be outlined


def draw_blocks(blocks: Sequence[Block], title: str) -> bytes:
    """Draw the block map as PNG, one bar a block.

    A bar extends from 1 to the block's largest response on held-out images in units of epsilon, on
    a logarithmic scale: upwards for an open gate, downwards for a closed one. The strip below it
    shows every block's state; it is the only part where no block has an epsilon.
    """
    from matplotlib.patches import Patch

    # Positions along the x axis, with a gap between stages, and their labels.
    gap = max(1.0, len(blocks) / 60)
    step = next(step for step in (1, 2, 5, 10, 25, 50, 100, 1000) if len(blocks) <= 50 * step)
    places: list[float] = []
    ticks: dict[float, str] = {}
    numbers: dict[float, str] = {}
    for members in _by_stage(blocks):
        start = places[-1] + 1 + gap if places else 0.0
        places += [start + index for index in range(len(members))]
        stage, left = members[0].stage, sum(block.state != "dead" for block in members)
        ticks[start + (len(members) - 1) / 2] = f"{stage}\n{left} of {len(members)} left"
        for index, block in list(enumerate(members))[::step]:
            numbers[start + index] = block.name.removeprefix(f"{stage}.")

    style: dict[str, Any] = {"color": [COLORS[block.state] for block in blocks], "width": 1.0}
    if len(blocks) <= OUTLINED:
        style |= {"width": 0.84, "edgecolor": EDGE, "linewidth": 0.6}
    measured = any(block.ratio is not None for block in blocks)
    figure = new_figure(13, 4.4 if measured else 1.9)
    heights = (8, 1) if measured else (1,)
    *upper, states = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, height_ratios=heights
    ).flat
    for axes in upper:
        ratios = [block.ratio for block in blocks if block.ratio]
        # A response of exactly 0 gets a bar to the edge.
        low, high = max(min([RANGE[0], *ratios]), 1e-4), max([RANGE[1], *ratios])
        bars = [float("nan") if b.ratio is None else max(b.ratio, low / 2) - 1 for b in blocks]
        axes.bar(places, bars, bottom=1.0, **style)
        log_scale(axes, [low, high])
        axes.set_ylim(low / 1.3, high * 1.3)
        axes.set_ylabel("largest |F| / ε, held-out images")
        axes.axhline(1.0, color="black", linewidth=1)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(axis="x", which="both", length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    states.bar(places, [1.0] * len(blocks), **style)
    states.xaxis.remove_overlapping_locs = False  # a number may be above its stage's name
    states.set_xticks(list(ticks), list(ticks.values()))
    states.set_xticks(list(numbers), list(numbers.values()), minor=True)
    states.set_yticks([])
    states.set_ylim(-0.05, 1.05)
    states.set_xlim(places[0] - 1, places[-1] + 1)
    states.tick_params(axis="x", length=0, pad=14)
    states.tick_params(axis="x", which="minor", length=0, pad=2, labelsize=7, labelcolor=EDGE)
    states.spines[:].set_visible(False)
    figure.axes[0].set_title(title, loc="left", fontsize=11)
    present = {block.state for block in blocks}
    figure.legend(
        handles=[
            Patch(facecolor=color, edgecolor=EDGE, linewidth=0.6, label=LABELS[state])
            for state, color in COLORS.items()
            if state in present
        ],
        loc="outside lower left",
        ncols=len(COLORS),
        frameon=False,
        fontsize=9,
    )
    return png(figure)


# -- The Pareto curve of a sweep: accuracy against parameters and against time


def draw_pareto(found: Sweep, title: str, selected: Point | None = None) -> bytes:
    """Draw a sweep as PNG: accuracy over parameters on the left, over milliseconds on the right.

    The knee and the selected point are marked. Error bars are 95 % intervals: of the drop against
    the first point, relative to that point's accuracy, and of the time.
    """
    points = found.points
    accuracy = [100 * point.accuracy for point in points]
    drops, times = [point.drop for point in points], [point.ms for point in points]
    shares = [100 * point.parameters_share for point in points]
    time_errors = [[ms.value - ms.low for ms in times], [ms.high - ms.value for ms in times]]
    marks = [("knee", points[found.knee], CLOSED, "o")]
    if selected is not None:
        marks.append(("selected", selected, "black", "s"))
    figure = new_figure(11, 4.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_ylabel(f"accuracy on {found.measured_on:,} held-out images, %")
    left.set_xlabel("parameters, % of the network as built")
    right.set_xlabel(f"ms an image: {found.timer}")
    for axes, x, x_errors in (
        (left, shares, None),
        (right, [ms.value for ms in times], time_errors),
    ):
        axes.errorbar(
            x,
            accuracy,
            xerr=x_errors,
            yerr=[[d.high - d.value for d in drops], [d.value - d.low for d in drops]],
            fmt="o-",
            color=OPEN,
            ecolor=f"{OPEN}50",  # translucent
            markersize=3.5,
            linewidth=1.2,
            label="with 95 % intervals",
        )
        for name, point, color, marker in marks:
            count = len(point.removed)
            axes.plot(
                x[points.index(point)],
                100 * point.accuracy,
                marker,
                markersize=11,
                markerfacecolor="none",
                markeredgecolor=color,
                markeredgewidth=2,
                label=f"{name}: {count} block{'' if count == 1 else 's'} removed,"
                f" {point.parameters_share:.1%} of the parameters, {point.accuracy:.1%}",
            )
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.invert_xaxis()  # the sweep goes from left to right
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower left", ncols=3)
    return png(figure)
