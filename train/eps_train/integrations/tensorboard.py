"""TensorBoard as a tracker: `eps-train --tracker tensorboard`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorboard  # noqa: F401  torch's writer does not name the package that it misses
from torch.utils.tensorboard import SummaryWriter

from eps_core.errors import naming
from eps_train.training.paths import EVENTS_SUFFIX
from eps_train.training.plots import Metrics, map_figure, peaks_figure
from eps_train.training.trackers import TrackedRun, scalars

PLOTS = 20  # of each kind in a run: drawing one takes as long as an epoch of a tiny network


class TensorBoard:
    """TensorBoard events of one run, in `paths.tensorboard`; steps are 1-based epochs.

    A resumed run adds an event file, and TensorBoard drops the epochs of earlier files that it
    repeats. Where there is no earlier file, the scalars of the epochs before are written first.
    """

    run_id = None

    def __init__(self, run: TrackedRun) -> None:
        self.path = run.paths.tensorboard
        self._plotted = {*range(0, run.epochs, -(-run.epochs // PLOTS)), run.epochs}
        missing = [] if run.paths.event_files() else run.before
        with naming(self.path):
            self._writer = SummaryWriter(
                self.path, purge_step=len(run.before) + 1, filename_suffix=EVENTS_SUFFIX
            )
        ended = time.time() - sum(line["seconds"] for line in missing)
        for line in missing:
            ended += line["seconds"]
            self._add(line, ended)

    def add(self, line: Mapping[str, Any], history: Callable[[], Metrics]) -> None:
        with naming(self.path):
            self._add(line, time.time())
            if line["gates"] and line["epoch"] in self._plotted:
                metrics = history()
                for tag, figure in (
                    ("gates/map", map_figure(metrics)),
                    ("gates/peaks", peaks_figure(metrics)),
                ):
                    self._writer.add_figure(tag, figure, line["epoch"])
            self._writer.flush()

    def close(self, *, finished: bool) -> None:
        self._writer.close()

    def _add(self, line: Mapping[str, Any], when: float) -> None:
        for tag, value in scalars(line).items():
            self._writer.add_scalar(tag, value, line["epoch"], walltime=when)
        if line["epsilon"]:
            peaks = np.array([gate["peak"] / line["epsilon"] for gate in line["gates"].values()])
            if len(peaks := peaks[np.isfinite(peaks)]):
                self._writer.add_histogram(
                    "gates/peak_over_epsilon", peaks, line["epoch"], walltime=when
                )
