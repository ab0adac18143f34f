"""Metrics: for Prometheus, for Triton's statistics, and live statistics for the page."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import prometheus_client as prometheus
from prometheus_client import Counter, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from eps_deploy.serving.batching import BatchStats
from eps_deploy.serving.shadow import ShadowBatch

CONTENT_TYPE = prometheus.CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_RECENT = 1000  # answers of the percentiles, and batches of the shadow's time ratio
_WINDOW = 10.0  # seconds over which the rates of the page are computed


class ShadowMetrics:
    """Agreement of a shadow with the served engine, and the times of both; for the event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._images = 0
        self._disagreed = 0
        self._dropped = 0
        self._failed = 0
        self._ratios: deque[float] = deque(maxlen=_RECENT)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"eps_shadow_{name}", text, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"eps_shadow_{name}", text, buckets=_SECONDS, registry=registry)

        self._images_total = counter("images", "Images that both engines answered.")
        self._disagreements_total = counter("disagreements", "Images whose best labels differ.")
        self._dropped_total = counter("dropped_images", "Images for which the shadow had no room.")
        self._failures_total = counter("failures", "Batches at which the shadow failed.")
        self._seconds = histogram("inference_seconds", "Time of a batch on the shadow's engine.")
        self._served_seconds = histogram(
            "served_seconds", "Time of the same batches on the served engine."
        )

    def compared(self, batch: ShadowBatch) -> None:
        """Count a batch that was sampled for the shadow."""
        if batch.outcome == "dropped":
            self._dropped += batch.images
            self._dropped_total.inc(batch.images)
        elif batch.outcome == "failed":
            self._failed += 1
            self._failures_total.inc()
        else:
            self._images += batch.images
            self._disagreed += batch.disagreed
            self._ratios.append(batch.seconds / batch.served)
            self._images_total.inc(batch.images)
            self._disagreements_total.inc(batch.disagreed)
            self._seconds.observe(batch.seconds)
            self._served_seconds.observe(batch.served)

    def figures(self) -> dict[str, Any]:
        """Plain data; `time_ratio`: median of shadow over served, of the last 1000 batches."""
        return {
            "images": self._images,
            "disagreements": self._disagreed,
            "disagreement": self._disagreed / self._images if self._images else None,
            "time_ratio": statistics.median(self._ratios) if self._ratios else None,
            "dropped_images": self._dropped,
            "failed_batches": self._failed,
        }


@dataclass(slots=True)
class Statistic:
    """Count and total nanoseconds: a `duration` of Triton's statistics."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.ns += int(seconds * 1e9)


@dataclass(slots=True)
class Totals:
    """Totals since the start of the process."""

    images: int = 0
    batches: int = 0
    success: Statistic = field(default_factory=Statistic)
    fail: Statistic = field(default_factory=Statistic)
    queue: Statistic = field(default_factory=Statistic)
    compute: Statistic = field(default_factory=Statistic)
    by_batch: dict[int, Statistic] = field(default_factory=dict)
    last: float = 0.0  # Unix time of the last inference


class Metrics:
    """All metrics of a server; for the event loop's thread only.

    Args:
        queued: returns the images that wait.
        connections: returns the open connections of HTTP.
        ready: returns whether the server answers.
        held: returns the bytes of request bodies that are held.
        shadow: whether there is one.
    """

    def __init__(
        self,
        *,
        queued: Callable[[], int],
        connections: Callable[[], int],
        ready: Callable[[], bool],
        held: Callable[[], int],
        shadow: bool = False,
    ) -> None:
        self.totals = Totals()
        self.refused: dict[str, int] = {}
        self._queued = queued
        self._recent: deque[tuple[float, float, int]] = deque(maxlen=_RECENT)
        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]  # would add a second series for each
        self._registry = CollectorRegistry()
        prometheus.ProcessCollector(registry=self._registry)  # memory, files, CPU time; on Linux
        self._requests = self._counter("requests", "Answers sent.", "endpoint", "code")
        self._refusals = self._counter("refusals", "Requests refused.", "reason")
        self._images = self._counter("images", "Images answered by the engine.")
        self._failures = self._counter("engine_failures", "Batches at which the engine failed.")
        self._not_finite = self._counter(
            "not_finite_images", "Images refused because their logits are not finite."
        )
        self._took = self._histogram("request_seconds", "From headers to answer.", _SECONDS)
        self._waited = self._histogram("queue_seconds", "Time of a request in the queue.", _SECONDS)
        self._computed = self._histogram("inference_seconds", "Engine time of a batch.", _SECONDS)
        self._batch = self._histogram("batch_size", "Images in a batch.", _BATCHES)
        self._gauge("queue_images", "Images that are waiting.", queued)
        self._gauge("connections", "Open connections of HTTP.", connections)
        self._gauge("ready", "1 when requests are answered.", lambda: float(ready()))
        self._gauge("body_bytes", "Bytes of request bodies held.", held)
        self._shadow = ShadowMetrics(self._registry) if shadow else None
        self._registry.register(_TritonNames(self.totals, queued))

    def _counter(self, name: str, text: str, *labels: str) -> prometheus.Counter:
        return prometheus.Counter(f"eps_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> prometheus.Histogram:
        return prometheus.Histogram(f"eps_{name}", text, buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        prometheus.Gauge(f"eps_{name}", text, registry=self._registry).set_function(read)

    def ran(self, batch: BatchStats) -> None:
        """Count a batch that ran, or failed."""
        if batch.failed is not None:
            self._failures.inc()
            return
        totals = self.totals
        totals.images += batch.images
        totals.batches += 1
        totals.last = time.time()
        totals.compute.add(batch.seconds)
        totals.by_batch.setdefault(batch.images, Statistic()).add(batch.seconds)
        self._images.inc(batch.images - batch.not_finite)
        self._not_finite.inc(batch.not_finite)
        self._batch.observe(batch.images)
        self._computed.observe(batch.seconds)
        for seconds in batch.waited:
            totals.queue.add(seconds)
            self._waited.observe(seconds)

    def compared(self, batch: ShadowBatch) -> None:
        """Count a batch of the shadow."""
        if self._shadow is not None:
            self._shadow.compared(batch)

    def inferred(self, seconds: float, images: int) -> None:
        """Count an answered inference request."""
        self.totals.success.add(seconds)
        self._recent.append((time.monotonic(), seconds, images))
        self._took.observe(seconds)

    def answered(self, endpoint: str, code: int | str) -> None:
        self._requests.labels(endpoint, str(code)).inc()

    def failed(self, reason: str, seconds: float) -> None:
        self.totals.fail.add(seconds)
        self.refused[reason] = self.refused.get(reason, 0) + 1
        self._refusals.labels(reason).inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return prometheus.generate_latest(self._registry)

    def figures(self) -> dict[str, Any]:
        """Statistics for the page: rates over ten seconds, percentiles of the last 1000 answers."""
        since = time.monotonic() - _WINDOW
        lately = [entry for entry in self._recent if entry[0] >= since]
        times = sorted(entry[1] for entry in self._recent)
        span = min(_WINDOW, time.monotonic() - lately[0][0]) if len(lately) == _RECENT else _WINDOW
        totals = self.totals
        return {
            "requests_per_second": len(lately) / span,
            "images_per_second": sum(entry[2] for entry in lately) / span,
            "requests": totals.success.count,
            "images": totals.images,
            "batches": totals.batches,
            "mean_batch": totals.images / totals.batches if totals.batches else None,
            "p50_ms": _percentile(times, 0.50),
            "p99_ms": _percentile(times, 0.99),
            "queued_images": self._queued(),
            "refused": dict(sorted(self.refused.items())),
            "shadow": self._shadow.figures() if self._shadow is not None else None,
        }


def _percentile(times: list[float], quantile: float) -> float | None:
    """Nearest rank of sorted seconds, in milliseconds."""
    return 1e3 * times[min(len(times) - 1, int(quantile * len(times)))] if times else None


class _TritonNames(Collector):
    """The same metrics by Triton's names, for its dashboards and autoscalers."""

    def __init__(self, totals: Totals, queued: Callable[[], int]) -> None:
        self._totals = totals
        self._queued = queued

    def collect(self) -> Iterable[Metric]:
        totals = self._totals
        for name, text, value in (
            ("request_success", "Successful requests", totals.success.count),
            ("request_failure", "Refused or failed requests", totals.fail.count),
            ("count", "Images inferred", totals.images),
            ("exec_count", "Batches executed", totals.batches),
            ("request_duration_us", "Microseconds of requests", totals.success.ns // 1000),
            ("queue_duration_us", "Microseconds in the queue", totals.queue.ns // 1000),
            ("compute_infer_duration_us", "Microseconds of inference", totals.compute.ns // 1000),
            ("pending_request_count", "Images that are waiting", self._queued()),
        ):
            # Triton's counters do not end in _total, so they cannot be declared as counters.
            metric = Metric(f"nv_inference_{name}", f"{text} (Triton's name)", "gauge")
            metric.add_sample(metric.name, {}, float(value))
            yield metric
