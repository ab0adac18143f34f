"""MLflow's own package records a run; skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from eps_train.cli import main
from tests.commands import run

pytest.importorskip("mlflow")
TINY = ("--model", "cifar:8x4", "--batch-size", "256", "--output", "out", "--tracker", "mlflow")


def test_a_run_and_its_resumption_are_one_run_of_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    mlflow.set_tracking_uri(None)
    for options in (("--epochs", 2), ("--epochs", 3, "--resume")):
        result = run("eps-train", main, *TINY, *options, cwd=tmp_path)
        assert result.code == 0, result.stderr
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("eps-resnet")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("out/ckpt", "FINISHED")
    assert found.data.params["model"] == "cifar:8x4"
    history = client.get_metric_history(found.info.run_id, "loss/validation")
    assert [metric.step for metric in history] == [1, 2, 3]


def test_without_a_server_it_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri(None)
    result = run("eps-train", main, *TINY, "--epochs", 1, cwd=tmp_path)
    assert result.code == 1
    assert result.error.startswith("eps-train: error: --tracker mlflow: ")
    assert not (tmp_path / "out/config.json").exists()
