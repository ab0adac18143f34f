"""MLflow as a tracker: `eps-train --tracker mlflow`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import mlflow

from eps_train.training.plots import Metrics
from eps_train.training.trackers import PROJECT, TrackedRun, scalars


class MLflow:
    """A run of MLflow: :func:`scalars` as metrics, the configuration as parameters.

    MLflow's own settings apply, such as MLFLOW_TRACKING_URI; the experiment is
    MLFLOW_EXPERIMENT_NAME, or :data:`PROJECT`. A resumed run continues its run of MLflow.
    """

    def __init__(self, run: TrackedRun) -> None:
        named = {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys()
        if run.run_id is None and not named:
            mlflow.set_experiment(PROJECT)
        self.run_id = str(mlflow.start_run(run.run_id, run_name=run.name).info.run_id)
        if run.run_id is None:
            mlflow.log_params(dict(run.config))

    def add(self, line: Mapping[str, Any], history: Callable[[], Metrics]) -> None:
        mlflow.log_metrics(scalars(line), step=line["epoch"], run_id=self.run_id)

    def close(self, *, finished: bool) -> None:
        mlflow.end_run("FINISHED" if finished else "KILLED")
