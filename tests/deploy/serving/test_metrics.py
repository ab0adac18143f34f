"""What Prometheus reads, and what the page shows."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from eps_deploy.serving.batching import Ran
from eps_deploy.serving.metrics import Metrics

from .test_frame import make_metrics


def used() -> Metrics:
    metrics = make_metrics()
    metrics.ran(Ran(images=4, seconds=0.004, waited=(0.001, 0.002)))
    metrics.ran(Ran(images=2, seconds=0.002, waited=()))
    metrics.ran(Ran(images=9, seconds=0.1, waited=(), failed=RuntimeError()))
    for seconds in (0.01, 0.02, 0.03):
        metrics.inferred(seconds, 2)
    metrics.answered("infer", 200)
    metrics.answered("infer", 503)
    metrics.refuse("queue-full", 0.0001)
    return metrics


def series(metrics: Metrics) -> dict[str, float]:
    lines = metrics.exposition().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_series() -> None:
    found = series(used())
    assert found['eps_requests_total{code="503",endpoint="infer"}'] == 1
    assert found['eps_refusals_total{reason="queue-full"}'] == 1
    assert found["eps_images_total"] == 6
    assert found["eps_engine_failures_total"] == 1
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


def test_names_are_as_promtool_wants_them() -> None:
    """Ours; Triton's break its rules: a help text, counters in _total, base units."""
    ours = [
        family
        for family in text_string_to_metric_families(used().exposition().decode())
        if not family.name.startswith("nv_inference")
    ]
    assert len(ours) >= 12
    for family in ours:
        assert family.name.startswith("eps_")
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        assert not family.name.endswith(("_ms", "_milliseconds", "_count", "_sum", "_bucket"))
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{family.name}_total"}
