"""Plots of a run, from its `metrics.jsonl`: `training.png`, and figures for TensorBoard."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eps_train.gating.rewriting import stage_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OPEN, CLOSED, DEAD = "#0b3c6f", "#e8922a", "#d0d0d0"
_VALIDATION, _TRAINING = OPEN, CLOSED
_GRID = "#e4e4e4"
FEW = 6  # learning rates, so that each gets a label on a logarithmic axis

Metrics = Sequence[Mapping[str, Any]]


def draw(metrics: Metrics, title: str) -> bytes:
    """Plot a run as PNG: accuracy, loss and learning rate; for a network with gates also dead
    blocks, parameters left, epsilon if it changed, and every block over time.

    `metrics` are the lines of `metrics.jsonl`, one or more epochs in order.
    """
    blocks = metrics[0]["gates"]
    rows = [_accuracy, _loss, _lr]
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
    """A figure outside of pyplot, so that no display is needed and no global state is changed.

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


def gate_table(
    metrics: Metrics, value: Callable[[Mapping[str, Any]], float]
) -> tuple[list[str], npt.NDArray[np.float64]]:
    """The gated blocks in the order of computation, and `value(gate)` `[blocks, epochs]`.

    NaN from the epoch on in which the block died; in the first one none is dead yet.
    """
    blocks = list(metrics[0]["gates"])
    live = [{b: g for b, g in line["gates"].items() if b not in line["died"]} for line in metrics]
    rows = [[value(gates[b]) if b in gates else np.nan for gates in live] for b in blocks]
    return blocks, np.array(rows)


# -- Rows of the plot


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


def _lr(axis: Axes, metrics: Metrics) -> None:
    lrs = [line["rate"] for line in metrics]
    _step_line(axis, metrics, lrs)
    used = sorted(set(lrs))
    if len(used) > FEW:  # a cosine
        axis.set_ylim(0, max(lrs) * 1.08)
    elif used[0] > 0:
        axis.set_yscale("log")
        axis.minorticks_off()
        axis.set_ylim(used[0] / 1.6, used[-1] * 1.6)
        axis.set_yticks(used, [f"{lr:g}" for lr in used])
    axis.set_ylabel("lr")


def _dead(axis: Axes, metrics: Metrics) -> None:
    """Dead blocks, and on a second scale the share of the parameters that is left."""
    from matplotlib.ticker import MaxNLocator

    dead = [line["dead"] for line in metrics]
    _step_line(axis, metrics, dead)
    axis.set_ylim(-0.03 * max(dead), max(1, *dead) * 1.08)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axis.set_ylabel("dead blocks", color=OPEN)
    counts = [line.get("parameters") for line in metrics]  # absent in older files
    shares = [100 * c["kept"] / c["total"] if c else np.nan for c in counts]
    if not any(np.isfinite(shares)):
        return
    other = axis.twinx()
    epochs = [line["epoch"] for line in metrics]
    other.step(epochs, shares, where="mid", color=CLOSED, linewidth=1.4)
    other.set_ylim(0, 105)
    other.set_ylabel("parameters, %", color=CLOSED)
    other.spines[["top", "left"]].set_visible(False)
    other.margins(x=0.01)


def _epsilon(axis: Axes, metrics: Metrics) -> None:
    epsilons = [line["epsilon"] for line in metrics]
    _step_line(axis, metrics, epsilons)
    axis.set_ylim(0, max(epsilons) * 1.08)
    axis.set_ylabel("epsilon")


def draw_map(axis: Axes, metrics: Metrics) -> None:
    """One row a block, one column an epoch: dark while the gate is open, grey once it is dead."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    blocks, closed = gate_table(metrics, lambda gate: gate["closed"] / max(gate["steps"], 1))
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
    """An image with a row a block and a column an epoch, with white lines between stages."""
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
    # The name of each stage is at its first block.
    axis.set_yticks(starts, [stage_name(blocks[row]) or blocks[row] for row in starts], fontsize=9)
    axis.set_ylabel(f"{len(blocks)} blocks, first on top")
    return image


# -- Shared by the rows


def _step_line(axis: Axes, metrics: Metrics, values: Sequence[float]) -> None:
    epochs = [line["epoch"] for line in metrics]
    axis.step(epochs, values, where="mid", color=OPEN, linewidth=1.4)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)


def _two_lines(
    axis: Axes, metrics: Metrics, validation: list[float], training: list[float], label: str
) -> None:
    epochs = [line["epoch"] for line in metrics]
    marker = "o" if len(epochs) == 1 else None  # one point makes no line
    style: dict[str, Any] = {"linewidth": 1.4, "marker": marker, "markersize": 4}
    axis.plot(epochs, training, color=_TRAINING, label=label, **style)
    axis.plot(epochs, validation, color=_VALIDATION, label="validation", **style)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)


def log_scale(axis: Axes, values: Sequence[float]) -> None:
    """Set a logarithmic scale with plain numbers; linear where a value is not positive."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not min(values, default=0) > 0:
        return
    axis.set_yscale("log")
    decades = np.log10(max(values) / min(values))
    # Between two powers of ten, 2 and 5 are needed for there to be any label at all.
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


# -- Figures of a run's blocks, for TensorBoard


def map_figure(metrics: Metrics) -> Figure:
    """The block map of the run so far."""
    figure = new_figure(9, 5)
    axis = figure.subplots()
    draw_map(axis, metrics)
    axis.set_xlabel("epoch")
    return figure


def peaks_figure(metrics: Metrics) -> Figure:
    """Peak response of each live block: in the last epoch (top), and in all epochs (bottom)."""
    figure = new_figure(9, 7)
    now, before = figure.subplots(2, 1, gridspec_kw={"height_ratios": (2, 3)})
    blocks, table = gate_table(metrics, lambda g: g["peak"] if g["peak"] > 0 else np.nan)
    now.plot(table[:, -1], ".", color=OPEN, markersize=4)
    now.set_title("live blocks; below the line a gate is closed on all steps", loc="left")
    epsilon = metrics[-1]["epsilon"]
    if epsilon:
        now.axhline(epsilon, color=CLOSED, linewidth=1.4, label=f"epsilon {epsilon:.3g}")
        now.legend(frameon=False, loc="upper right")
    peaks = table[np.isfinite(table[:, -1]), -1].tolist()
    log_scale(now, [*peaks, epsilon] if epsilon else peaks)
    now.set_xlim(-0.5, len(blocks) - 0.5)
    now.set_xlabel("block, in the order of computation")
    now.set_ylabel(f"peak response, epoch {metrics[-1]['epoch']}")
    image = show_blocks(before, np.log10(table), metrics, blocks, cmap="viridis")
    before.set_facecolor(DEAD)
    before.set_title("all epochs; grey: dead", loc="left")
    before.set_xlabel("epoch")
    figure.colorbar(image, ax=before, label="log10 of the peak response", pad=0.01)
    return figure
