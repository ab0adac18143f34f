"""`training.png`: a run at a glance, drawn from its `metrics.jsonl`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eps_train.graph import stage_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OPEN, CLOSED, DEAD = "#0b3c6f", "#e8922a", "#d0d0d0"
_VALIDATION, _TRAINING = OPEN, CLOSED
_GRID = "#e4e4e4"

Metrics = Sequence[Mapping[str, Any]]


def draw(metrics: Metrics, title: str) -> bytes:
    """Draw a run as PNG: accuracy, loss, learning rate, and of a network with gates also the dead
    blocks, the parameters left, epsilon if it changed, and every block over time.

    Args:
        metrics: the lines of `metrics.jsonl`, one or more epochs in order.
        title: above the picture.
    """
    blocks = gated_blocks(metrics)
    rows = [_accuracy, _loss, _rate]
    heights = [2.0, 2.0, 1.0]
    if blocks:
        rows.append(_dead)
        heights.append(1.3)
        if len({line["epsilon"] for line in metrics}) > 1:
            rows.append(_epsilon)
            heights.append(1.0)
        rows.append(draw_map)
        heights.append(min(max(4.0, len(blocks) / 40), 8.0))  # two pixels a block at depth 752
    figure = new_figure(11, 1.3 + sum(heights) * 0.85)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    axes = figure.subplots(
        len(rows), 1, sharex=True, gridspec_kw={"height_ratios": heights}, squeeze=False
    )[:, 0]
    for axis, row in zip(axes, rows, strict=True):
        row(axis, metrics)
    axes[-1].set_xlabel("epoch")
    for axis in axes:
        axis.margins(x=0.01)
        axis.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    return png(figure)


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, not pyplot's: no display is looked for and nothing global is changed.

    Width and height are in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def gated_blocks(metrics: Metrics) -> list[str]:
    """The gated blocks, in the order of computation; in the first epoch none is dead yet."""
    return list(metrics[0]["gates"])


# -- one row of the picture each -----------------------------------------------------------------


def _accuracy(axis: Axes, metrics: Metrics) -> None:
    validation = [100 * line["validation"]["accuracy"] for line in metrics]
    training = [100 * line["train_accuracy"] for line in metrics]
    _two_lines(axis, metrics, validation, training, "training")
    axis.set_ylabel("accuracy, %")
    axis.legend(frameon=False, ncols=2, fontsize=9, loc="lower right")


def _loss(axis: Axes, metrics: Metrics) -> None:
    validation = [line["validation"]["loss"] for line in metrics]
    training = [line["loss"] for line in metrics]
    _two_lines(axis, metrics, validation, training, "training, with side head")
    log_scale(axis, [*validation, *training])
    axis.set_ylabel("loss")
    axis.legend(frameon=False, ncols=2, fontsize=9, loc="upper right")


def _rate(axis: Axes, metrics: Metrics) -> None:
    rates = [line["rate"] for line in metrics]
    axis.step(_epochs(metrics), rates, where="mid", color=OPEN, linewidth=1.4)
    if min(rates) > 0:
        axis.set_yscale("log")
        axis.minorticks_off()
        axis.set_ylim(min(rates) / 1.6, max(rates) * 1.6)
        used = sorted(set(rates))  # a few steps: each is worth its figure
        axis.set_yticks(used, [f"{rate:g}" for rate in used])
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_ylabel("rate")


def _dead(axis: Axes, metrics: Metrics) -> None:
    """Dead blocks as steps, and on a scale of their own the parameters that are left."""
    from matplotlib.ticker import MaxNLocator

    dead = [line["dead"] for line in metrics]
    axis.step(_epochs(metrics), dead, where="mid", color=OPEN, linewidth=1.4)
    axis.set_ylim(-0.03 * max(dead), max(1, *dead) * 1.08)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_ylabel("dead blocks", color=OPEN)
    shares = [100 * _share(line) for line in metrics]
    if not any(np.isfinite(shares)):
        return
    other = axis.twinx()
    other.step(_epochs(metrics), shares, where="mid", color=CLOSED, linewidth=1.4)
    other.set_ylim(0, 105)
    other.set_ylabel("parameters, %", color=CLOSED)
    other.spines[["top", "left"]].set_visible(False)
    other.margins(x=0.01)


def _epsilon(axis: Axes, metrics: Metrics) -> None:
    epsilons = [line["epsilon"] for line in metrics]
    axis.step(_epochs(metrics), epsilons, where="mid", color=OPEN, linewidth=1.4)
    axis.set_ylim(0, max(epsilons) * 1.08)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_ylabel("epsilon")


def draw_map(axis: Axes, metrics: Metrics) -> None:
    """One row a block, one column an epoch: dark while the gate is open, grey once it is dead."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    blocks = gated_blocks(metrics)
    closed = np.full((len(blocks), len(metrics)), np.nan)
    for column, line in enumerate(metrics):
        for row, block in enumerate(blocks):
            gate = line["gates"].get(block)
            if gate is not None and block not in line["died"]:
                closed[row, column] = gate["closed"] / max(gate["steps"], 1)
    dead = np.isnan(closed)
    colors = LinearSegmentedColormap.from_list("gates", [OPEN, CLOSED])(np.nan_to_num(closed))
    colors[dead] = to_rgba(DEAD)
    show_blocks(axis, colors, metrics, blocks)
    axis.set_title(
        "gates: dark open, orange closed on all steps, grey dead"
        f" ({dead[:, -1].sum()} of {len(blocks)} at the end)",
        loc="left",
        fontsize=10,
    )


def show_blocks(
    axis: Axes, values: npt.NDArray[Any], metrics: Metrics, blocks: Sequence[str], **style: Any
) -> Any:
    """An image with a row a block and a column an epoch, the stages parted by white lines."""
    first, last = metrics[0]["epoch"], metrics[-1]["epoch"]
    image = axis.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        extent=(first - 0.5, last + 0.5, len(blocks) - 0.5, -0.5),
        **style,
    )
    starts = [0]
    for row in range(1, len(blocks)):
        if stage_name(blocks[row]) != stage_name(blocks[row - 1]):
            axis.axhline(row - 0.5, color="white", linewidth=2)
            starts.append(row)
    # The name of each stage stands at its first block.
    axis.set_yticks(starts, [stage_name(blocks[row]) or blocks[row] for row in starts], fontsize=9)
    axis.set_ylabel(f"{len(blocks)} blocks, first on top")
    return image


# -- shared by the rows --------------------------------------------------------------------------


def _epochs(metrics: Metrics) -> list[int]:
    return [line["epoch"] for line in metrics]


def _share(line: Mapping[str, Any]) -> float:
    """Share of the parameters that are left, 0..1; NaN in a log that does not tell."""
    parameters = line.get("parameters")
    return parameters["kept"] / parameters["total"] if parameters else float("nan")


def _two_lines(
    axis: Axes,
    metrics: Metrics,
    validation: Sequence[float],
    training: Sequence[float],
    training_label: str,
) -> None:
    epochs = _epochs(metrics)
    marker = "o" if len(epochs) == 1 else None  # one point makes no line
    style: dict[str, Any] = {"linewidth": 1.4, "marker": marker, "markersize": 4}
    axis.plot(epochs, training, color=_TRAINING, label=training_label, **style)
    axis.plot(epochs, validation, color=_VALIDATION, label="validation", **style)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)


def log_scale(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic scale with plain numbers on it; linear where a value does not allow it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not min(values, default=0) > 0:
        return
    axis.set_yscale("log")
    decades = np.log10(max(values) / min(values))
    # Between two powers of ten, 2 and 5 are needed for there to be any label at all.
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
