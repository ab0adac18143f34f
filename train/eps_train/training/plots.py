"""`training.png`: a run at a glance, drawn from its `metrics.jsonl`."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eps_core.errors import naming
from eps_train.gating.rewriting import stage_name
from eps_train.training.files import RunPaths

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


# -- TensorBoard's event files: a run's scalars, its gates' peaks, its block map
#
# The records are written here and not by TensorBoard's own writer: that one has a thread, which
# hides a full disk until later, and names its files after the host.

PICTURES = 20  # of each kind in a run: to draw one takes as long as an epoch of a tiny network


def require() -> None:
    """Raise ModuleNotFoundError, that the command line explains, when TensorBoard is missing."""
    import tensorboard.summary.writer.record_writer  # noqa: F401


class TensorBoardLog:
    """The event file of one run; steps are 1-based epochs.

    A resumed run writes the epochs before it once more, from `metrics.jsonl`, into a file of its
    own: so none is missing and none is there twice, wherever it was killed, and even if this was
    not asked for then.
    """

    def __init__(self, files: RunPaths, *, epochs: int, before: Metrics) -> None:
        """Begin the file of a run of `epochs` in all; `before` are the lines of those done."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._pictured = {*range(0, epochs, -(-epochs // PICTURES)), epochs}
        self.path = files.events(len(before))
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in files.all_events():
                path.unlink()
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # A TensorBoard that is looking on drops what it has read of the files before.
        self._append(Event(step=1, session_log=SessionLog(status=SessionLog.START)))
        ended = time.time() - sum(line["seconds"] for line in before)
        for line in before:
            ended += line["seconds"]
            self._append(_event(line, [], ended))

    def add(self, line: Mapping[str, Any], history: Callable[[], Metrics]) -> None:
        """Write an epoch: its line of `metrics.jsonl`; `history` gives all lines so far."""
        pictures = []
        if line["gates"] and line["epoch"] in self._pictured:
            metrics = history()
            pictures = [
                ("gates/map", _picture_of_map(metrics)),
                ("gates/peaks", _picture_of_peaks(metrics)),
            ]
        self._append(_event(line, pictures, time.time()))

    def _append(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        with naming(self.path), self.path.open("ab") as file:
            RecordWriter(file).write(event.SerializeToString())


def _event(line: Mapping[str, Any], pictures: list[tuple[str, bytes]], when: float) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(line).items()]
    ratios = _peaks_over_epsilon(line)
    if ratios:
        values.append(Summary.Value(tag="gates/peak_over_epsilon", histo=_histogram(ratios)))
    for tag, picture in pictures:
        image = Summary.Image(encoded_image_string=picture, colorspace=4)
        image.width, image.height = _size(picture)
        values.append(Summary.Value(tag=tag, image=image))
    return Event(wall_time=when, step=line["epoch"], summary=Summary(value=values))


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """An epoch's figures by TensorBoard's tags; `line` is one of `metrics.jsonl`."""
    found = {
        "accuracy/training": line["train_accuracy"],
        "accuracy/validation": line["validation"]["accuracy"],
        "loss/training": line["loss"],
        "loss/validation": line["validation"]["loss"],
        "run/rate": line["rate"],
        "run/images_per_second": line["images_per_second"],
        "run/seconds": line["seconds"],
    }
    if line["gates"] or line["dead"]:
        found["gates/epsilon"] = line["epsilon"]
        found["blocks/dead"] = line["dead"]
        found["blocks/discarded"] = line["discarded"]
    if parameters := line.get("parameters"):
        found["blocks/parameters_left"] = parameters["kept"] / parameters["total"]
    return found


def _peaks_over_epsilon(line: Mapping[str, Any]) -> list[float]:
    """Peak response of each live gate in units of epsilon; none while the gates are held open."""
    if not line["epsilon"]:
        return []
    peaks = [gate["peak"] / line["epsilon"] for gate in line["gates"].values()]
    return [peak for peak in peaks if math.isfinite(peak)]


def _histogram(values: Iterable[float]) -> Any:
    """A histogram whose bins are twentieths of a decade, as peaks range over several decades."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    numbers = np.array(list(values))
    limits = np.concatenate([[0.0], np.logspace(-4, 4, 161), [np.inf]])
    counts, _ = np.histogram(numbers, limits)
    used = np.flatnonzero(counts)
    # TensorBoard shows from the first bin to the last: those beyond the values are left out.
    chosen = slice(max(used[0] - 1, 0), used[-1] + 1)
    return HistogramProto(
        min=numbers.min(),
        max=numbers.max(),
        num=len(numbers),
        sum=numbers.sum(),
        sum_squares=np.square(numbers).sum(),
        bucket_limit=np.minimum(limits[1:], 1e300)[chosen].tolist(),
        bucket=counts[chosen].tolist(),
    )


def _picture_of_map(metrics: Metrics) -> bytes:
    figure = new_figure(9, 5)
    axis = figure.subplots()
    draw_map(axis, metrics)
    axis.set_xlabel("epoch")
    return png(figure)


def _picture_of_peaks(metrics: Metrics) -> bytes:
    """Above, each block's peak in the last epoch; below, of all epochs: who is nearing the end."""
    figure = new_figure(9, 7)
    now, before = figure.subplots(2, 1, gridspec_kw={"height_ratios": (2, 3)})
    blocks = gated_blocks(metrics)
    table = np.full((len(blocks), len(metrics)), np.nan)
    for column, line in enumerate(metrics):
        for row, block in enumerate(blocks):
            if block in line["gates"] and line["gates"][block]["peak"] > 0:
                table[row, column] = line["gates"][block]["peak"]
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
    return png(figure)


def _size(picture: bytes) -> tuple[int, int]:
    """Width and height of a PNG: they stand at the head of its first chunk."""
    return int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")
