"""Weights & Biases as a tracker: `eps-train --tracker wandb`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import wandb

from eps_train.training.plots import Metrics
from eps_train.training.trackers import PROJECT, TrackedRun, scalars


class WandB:
    """A run of Weights & Biases: :func:`scalars`, and the configuration.

    W&B's own settings apply, such as WANDB_MODE=offline; the project is WANDB_PROJECT, or
    :data:`PROJECT`. Its files are in the folder `wandb/` of the run's. A resumed run continues
    its run of W&B.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=run.paths.best.parent,
            name=run.name,
            id=run.run_id,
            resume="allow" if run.run_id else None,
            config=dict(run.config),
            reinit="create_new",  # the baseline's run begins while the first one's is at hand
        )
        self.run_id = str(self._run.id)

    def add(self, line: Mapping[str, Any], history: Callable[[], Metrics]) -> None:
        self._run.log(scalars(line), step=line["epoch"])

    def close(self, *, finished: bool) -> None:
        self._run.finish(0 if finished else 1)
