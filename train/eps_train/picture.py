"""`training.png`: a run at a glance, drawn from its `metrics.jsonl`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OPEN, DEAD = "#0b3c6f", "#d0d0d0"
_INK = ("#0b3c6f", "#e8922a")


def draw(metrics: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Draw a run as PNG: accuracy, loss, learning rate, dead blocks, and every block over time.

    Args:
        metrics: the lines of `metrics.jsonl`, one or more epochs in order.
        title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = np.array([line["epoch"] for line in metrics])
    blocks = _blocks(metrics)
    # A figure of its own, not pyplot's: no display is looked for and nothing global is changed.
    figure = Figure(figsize=(11, 8 if blocks else 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    ratios = (2, 2, 1, 4) if blocks else (2, 2, 1)
    axes = figure.subplots(
        len(ratios), 1, sharex=True, gridspec_kw={"height_ratios": ratios}, squeeze=False
    )[:, 0]
    _lines(
        axes[0],
        epochs,
        {
            "validation": [100 * line["validation"]["accuracy"] for line in metrics],
            "training": [100 * line["train_accuracy"] for line in metrics],
        },
        "accuracy, %",
    )
    _lines(
        axes[1],
        epochs,
        {
            "validation": [line["validation"]["loss"] for line in metrics],
            "training (with side head)": [line["loss"] for line in metrics],
        },
        "loss",
    )
    axes[1].set_yscale("log")
    axes[2].step(epochs, [line["rate"] for line in metrics], where="mid", color=_INK[0])
    axes[2].set_yscale("log")
    axes[2].set_ylabel("rate")
    if blocks:
        _map(axes[3], metrics, blocks)
    axes[-1].set_xlabel("epoch")
    for axis in axes:
        axis.margins(x=0.01)
        axis.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _blocks(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The gated blocks, in the order of computation; in the first epoch none is dead yet."""
    return list(metrics[0]["gates"])


def _lines(
    axis: Axes, epochs: npt.NDArray[Any], series: Mapping[str, Sequence[float]], label: str
) -> None:
    for color, (name, values) in zip(_INK, series.items(), strict=True):
        axis.plot(epochs, values, color=color, label=name, linewidth=1.4)
    axis.set_ylabel(label)
    axis.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axis.legend(frameon=False, ncols=2, fontsize=9, loc="best")


def _map(axis: Axes, metrics: Sequence[Mapping[str, Any]], blocks: Sequence[str]) -> None:
    """One row a block, one column an epoch: dark while the gate is open, grey once it is dead."""
    from matplotlib.colors import LinearSegmentedColormap

    closed = np.ones((len(blocks), len(metrics)))
    dead = np.ones_like(closed, dtype=bool)
    for column, line in enumerate(metrics):
        for row, block in enumerate(blocks):
            gate = line["gates"].get(block)
            if gate is not None and block not in line["died"]:
                dead[row, column] = False
                closed[row, column] = gate["closed"] / max(gate["steps"], 1)
    shades = LinearSegmentedColormap.from_list("gates", [OPEN, "#e8922a"])
    colors = shades(closed)
    colors[dead] = (*(int(DEAD[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0)
    first, last = metrics[0]["epoch"], metrics[-1]["epoch"]
    axis.imshow(
        colors,
        aspect="auto",
        interpolation="nearest",
        extent=(first - 0.5, last + 0.5, len(blocks) - 0.5, -0.5),
    )
    for row in range(1, len(blocks)):
        if _stage(blocks[row]) != _stage(blocks[row - 1]):
            axis.axhline(row - 0.5, color="white", linewidth=2)
    axis.set_ylabel("block, first on top")
    axis.set_title(
        f"gates: dark open, orange closed on all steps, grey dead ({dead[:, -1].sum()} of"
        f" {len(blocks)} at the end)",
        loc="left",
        fontsize=10,
    )


def _stage(block: str) -> str:
    return block.rpartition(".")[0]
