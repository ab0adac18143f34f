"""TensorBoard's event files: a run's scalars, its gates' peaks, its block map.

The records are written here and not by TensorBoard's own writer: that one has a thread, which hides
a full disk until later, and names its files after the host.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from eps_train.errors import naming
from eps_train.picture import (
    CLOSED,
    DEAD,
    OPEN,
    Metrics,
    draw_map,
    gated_blocks,
    log_scale,
    new_figure,
    png,
    show_blocks,
)
from eps_train.runfiles import RunFiles

PICTURES = 20  # of each kind in a run: to draw one takes as long as an epoch of a tiny network


def require() -> None:
    """Raise ModuleNotFoundError, that the command line explains, when TensorBoard is missing."""
    import tensorboard.summary.writer.record_writer  # noqa: F401


class Board:
    """The event file of one run; steps are 1-based epochs.

    A resumed run writes the epochs before it once more, from `metrics.jsonl`, into a file of its
    own: so none is missing and none is there twice, wherever it was killed, and even if this was
    not asked for then.
    """

    def __init__(self, files: RunFiles, *, epochs: int, before: Metrics) -> None:
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
