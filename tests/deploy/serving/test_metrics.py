"""Metrics for Prometheus, Triton's statistics and the page."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from eps_deploy.serving.batching import BatchStats
from eps_deploy.serving.metrics import Metrics
from tests.deploy.serving.running import MODEL, command, until
from tests.deploy.serving.test_middleware import make_metrics


def used() -> Metrics:
    metrics = make_metrics()
    metrics.ran(BatchStats(images=4, seconds=0.004, waited=(0.001, 0.002)))
    metrics.ran(BatchStats(images=2, seconds=0.002, waited=(), not_finite=1))
    metrics.ran(BatchStats(images=9, seconds=0.1, waited=(), failed=RuntimeError()))
    for seconds in (0.01, 0.02, 0.03):
        metrics.inferred(seconds, 2)
    metrics.answered("infer", 200)
    metrics.answered("infer", 503)
    metrics.failed("queue-full", 0.0001)
    return metrics


def series(metrics: Metrics) -> dict[str, float]:
    lines = metrics.exposition().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_series() -> None:
    found = series(used())
    assert found['eps_requests_total{code="503",endpoint="infer"}'] == 1
    assert found['eps_refusals_total{reason="queue-full"}'] == 1
    assert found["eps_images_total"] == 5
    assert found["eps_engine_failures_total"] == 1
    assert found["eps_not_finite_images_total"] == 1
    assert found['eps_batch_size_bucket{le="2.0"}'] == 1
    assert found["eps_batch_size_sum"] == 6
    assert found["eps_queue_seconds_count"] == 2
    assert found["eps_inference_seconds_sum"] == pytest.approx(0.006)
    assert found["eps_queue_images"] == 3
    assert found["eps_connections"] == 2
    assert found["eps_ready"] == 1
    assert not [name for name in found if "_created" in name]


def test_tritons_names() -> None:
    found = series(used())
    assert found["nv_inference_count"] == 6
    assert found["nv_inference_exec_count"] == 2
    assert found["nv_inference_request_success"] == 3
    assert found["nv_inference_request_failure"] == 1
    assert found["nv_inference_pending_request_count"] == 3
    assert found["nv_inference_queue_duration_us"] == pytest.approx(3000, abs=1)


def test_figures() -> None:
    figures = used().figures()
    assert figures["requests"] == 3
    assert (figures["images"], figures["batches"], figures["mean_batch"]) == (6, 2, 3)
    assert (figures["p50_ms"], figures["p99_ms"]) == (20, 30)
    assert figures["requests_per_second"] == pytest.approx(0.3)
    assert figures["images_per_second"] == pytest.approx(0.6)
    nothing = make_metrics().figures()
    assert nothing["p50_ms"] is None
    assert nothing["mean_batch"] is None


def test_process_metrics() -> None:
    found = series(used())
    assert found["process_resident_memory_bytes"] > 1 << 20
    assert found["process_open_fds"] >= 3


@pytest.fixture(scope="module")
def exposed(deployed: Path) -> str:
    """Of a server that has worked, refused, and compared with a shadow."""
    options = ("--shadow", "baseline", "--shadow-share", 1)
    with command(deployed / "bundle", *options) as process:
        process.wait_ready()
        raw = {"Inference_Header_Content_Length": "0"}
        assert process.ask("POST", f"{MODEL}/infer", bytes(64), **raw).status == 200
        assert process.post(f"{MODEL}/infer", b"{").status == 400
        assert process.get("/nowhere").status == 404
        until(lambda: process.get("/v1/figures").json["shadow"]["images"] == 1)
        answer = process.get("/metrics")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert process.stop() == 0
    text = answer.body.decode()
    for name in ("images_total 1.0", "shadow_images_total 1.0", 'refusals_total{reason="invalid"}'):
        assert f"eps_{name}" in text
    return "".join(line for line in text.splitlines(True) if "nv_inference" not in line)


def test_metric_names_follow_the_rules_of_promtool(exposed: str) -> None:
    """Its rules, on a machine that has none. Triton's names, left out above, break several."""
    families = list(text_string_to_metric_families(exposed))
    assert len([family for family in families if family.name.startswith("eps_")]) >= 18
    types = ("counter", "gauge", "histogram")
    wrong = {"count", "sum", "bucket", "total", "info", *types}
    wrong |= {"ms", "us", "ns", "kb", "mb", "percent", "minutes", "milliseconds", "kilobytes"}
    for family in families:
        assert family.name.startswith(("eps_", "process_"))
        assert family.documentation
        assert family.type in types
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", family.name)
        assert not wrong.intersection(family.name.split("_")), family.name
        names = {sample.name for sample in family.samples}
        if family.type == "counter":
            assert names <= {f"{family.name}_total"}
        for sample in family.samples:
            assert all(re.fullmatch(r"[a-z_]+", label) for label in sample.labels)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on this machine")
def test_promtool(exposed: str) -> None:
    """It says yes to nothing at all, so there is something."""
    assert exposed.count("\n") > 100
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=exposed, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
