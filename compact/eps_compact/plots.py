"""The block map as a picture: which blocks are left, and how far each was from the other side."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eps_compact.analysis.sweep import Point, Sweep
from eps_compact.evidence import BlockEvidence
from eps_core.errors import ConfigError
from eps_core.files import replace_file
from eps_train.gating import rewriting
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.plots import CLOSED, OPEN, new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# -- The block map: every residual block of the network as it was built, and what became of it

State = Literal["alive", "flickering", "dead"]
# The signs of the training progress.
SYMBOLS: dict[State, str] = {"alive": "█", "flickering": "▒", "dead": "·"}
LEGEND = "  ".join(f"{symbol} {state}" for state, symbol in SYMBOLS.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One block of the map.

    Attributes:
        name, stage: its name and the group it belongs to.
        state: `dead`: removed; `flickering`: live, but its gate was closed on steps of the last
            epoch; `alive`: on none of them, or it has no gate.
        ratio: largest response on held-out images in units of epsilon, for a dead block when it
            died; None without an epsilon.
    """

    name: str
    stage: str
    state: State
    ratio: float | None


def block_map(checkpoint: Checkpoint, live: Iterable[BlockEvidence]) -> tuple[Block, ...]:
    """All blocks, in the order of computation; `live` as `evidence.liveness` measured them."""
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
            state = "flickering" if measured[name].closed else "alive"
        blocks.append(Block(name=name, stage=rewriting.stage_name(name), state=state, ratio=ratio))
    return tuple(blocks)


def stages(blocks: Iterable[Block]) -> list[tuple[str, list[Block]]]:
    """The blocks by stage, in the order of computation."""
    return [(stage, list(members)) for stage, members in groupby(blocks, lambda b: b.stage)]


def strip(blocks: Iterable[Block]) -> str:
    """The map as text: one character a block, a space between stages; see `LEGEND`."""
    return " ".join(
        "".join(SYMBOLS[block.state] for block in members) for _, members in stages(blocks)
    )


FORMATS = ("png", "svg", "pdf")
# Dark, middle and light, so that they differ in greyscale and for colour-blind readers too.
COLORS: dict[State, str] = {"alive": "#0b3c6f", "flickering": "#e8922a", "dead": "#d0d0d0"}
LABELS: dict[State, str] = {
    "alive": "alive",
    "flickering": "alive, but closed on steps of the last epoch",
    "dead": "removed (response when it died)",
}
EDGE = "#6f6f6f"
RANGE = (0.5, 2.0)  # the least span of the logarithmic axis, in units of epsilon
OUTLINED = 150  # more bars than this are too narrow to be outlined


def draw_blocks(blocks: Sequence[Block], title: str, format: str = "png") -> bytes:
    """Draw the map, one bar a block, and return the picture's bytes.

    A bar reaches from 1 to the block's largest response on held-out images in units of epsilon, on
    a logarithmic scale: upwards an open gate, downwards a closed one. The strip below shows every
    block's state; alone when there was no epsilon.

    Args:
        blocks: one or more, in the order of computation.
        title: above the picture.
        format: one of `FORMATS`.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = any(block.ratio is not None for block in blocks)
    # A figure of its own, not pyplot's: no display is looked for and nothing global is changed.
    with rc_context({"svg.hashsalt": "eps-compact", "font.size": 10}):
        figure = Figure(figsize=(11, 3.8 if measured else 1.6), layout="constrained")
        FigureCanvasAgg(figure)
        places = _places(blocks)
        if measured:
            upper, lower = figure.subplots(
                2, 1, sharex=True, gridspec_kw={"height_ratios": (8, 1), "hspace": 0.02}
            )
            _bars(upper, blocks, places)
            upper.set_title(title, loc="left", fontsize=11)
        else:
            lower = figure.subplots()
            lower.set_title(title, loc="left", fontsize=11)
        _strip(lower, blocks, places)
        _legend(figure, blocks)
        content = io.BytesIO()
        # No creation date: the same blocks give the same bytes.
        date = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(format)
        figure.savefig(content, format=format, dpi=160, metadata=date)
    return content.getvalue()


def save(path: Path, blocks: Sequence[Block], title: str) -> None:
    """Draw the map into `path`; its ending picks the format.

    Raises ConfigError when the ending is not one of `FORMATS`.
    """
    format = path.suffix.lower().removeprefix(".")
    if format not in FORMATS:
        raise ConfigError(f"{path}: not a picture's name; end it in .{', .'.join(FORMATS)}")
    replace_file(path, draw_blocks(blocks, title, format))


def _places(blocks: Sequence[Block]) -> list[float]:
    """Where each block's bar goes, in bar widths, with a gap between stages."""
    gap = max(1.0, len(blocks) / 60)
    return [
        index + gap * stage
        for stage, (start, members) in enumerate(_ranges(blocks))
        for index in range(start, start + len(members))
    ]


def _ranges(blocks: Sequence[Block]) -> list[tuple[int, list[Block]]]:
    """Each stage's first index and its blocks."""
    found, start = [], 0
    for _, members in stages(blocks):
        found.append((start, members))
        start += len(members)
    return found


def _bars(axes: Axes, blocks: Sequence[Block], places: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ratios = [block.ratio for block in blocks if block.ratio]
    low, high = min([RANGE[0], *ratios]), max([RANGE[1], *ratios])
    low = max(low, 1e-4)  # a branch that answers exactly 0 gets a bar to the edge
    for state in COLORS:
        bars = [
            (place, max(block.ratio, low / 2) - 1)
            for block, place in zip(blocks, places, strict=True)
            if block.state == state and block.ratio is not None
        ]
        axes.bar(*_columns(bars), bottom=1.0, **_style(state, len(blocks)))
    axes.set_yscale("log")
    axes.set_ylim(low / 1.3, high * 1.3)
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ε"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("largest |F|, held-out images")
    axes.axhline(1.0, color="black", linewidth=1)
    axes.grid(axis="y", color="#e9e9e9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", which="both", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _strip(axes: Axes, blocks: Sequence[Block], places: Sequence[float]) -> None:
    """The states as a row of cells, and under it the stages."""
    for state in COLORS:
        cells = [
            (place, 1.0)
            for block, place in zip(blocks, places, strict=True)
            if block.state == state
        ]
        axes.bar(*_columns(cells), **_style(state, len(blocks)))
    ticks, names = [], []
    for start, members in _ranges(blocks):
        ticks.append((places[start] + places[start + len(members) - 1]) / 2)
        left = sum(block.state != "dead" for block in members)
        names.append(f"{members[0].stage}\n{left} of {len(members)} left")
    numbers = _numbers(blocks)
    axes.xaxis.remove_overlapping_locs = False  # a number may stand above its stage's name
    axes.set_xticks(ticks, names)
    axes.set_xticks([places[index] for index in numbers], list(numbers.values()), minor=True)
    axes.set_yticks([])
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlim(places[0] - 1, places[-1] + 1)
    axes.tick_params(axis="x", length=0, pad=14)
    axes.tick_params(axis="x", which="minor", length=0, pad=2, labelsize=7, labelcolor=EDGE)
    axes.spines[:].set_visible(False)


def _numbers(blocks: Sequence[Block]) -> dict[int, str]:
    """Which blocks have their number written below them, as many as there is room for."""
    step = next(
        step for step in (1, 2, 5, 10, 25, 50, 100, len(blocks)) if len(blocks) <= 50 * step
    )
    return {
        start + index: member.name.removeprefix(f"{member.stage}.")
        for start, members in _ranges(blocks)
        for index, member in enumerate(members)
        if index % step == 0
    }


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


def _style(state: State, count: int) -> dict[str, Any]:
    if count > OUTLINED:
        return {"width": 1.0, "color": COLORS[state]}
    return {"width": 0.84, "color": COLORS[state], "edgecolor": EDGE, "linewidth": 0.6}


def _legend(figure: Figure, blocks: Sequence[Block]) -> None:
    from matplotlib.patches import Patch

    present = {block.state for block in blocks}
    figure.legend(
        handles=[
            Patch(facecolor=COLORS[state], edgecolor=EDGE, linewidth=0.6, label=LABELS[state])
            for state in COLORS
            if state in present
        ],
        loc="outside lower left",
        ncols=len(COLORS),
        frameon=False,
        fontsize=9,
    )


# -- `pareto.png`: what a sweep found, accuracy against parameters and against time

_GRID = "#e4e4e4"


def draw_pareto(found: Sweep, title: str, picked: Point | None = None) -> bytes:
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
