"""Metrics: for Prometheus, for Triton's statistics, and live statistics for the page."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import prometheus_client as prometheus
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.registry import CollectorRegistry

from eps_deploy.serving.batching import BatchStats
from eps_deploy.serving.protocol import Signature
from eps_deploy.serving.shadow import ShadowBatch

CONTENT_TYPE = prometheus.CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_RECENT = 1000  # answers of the percentiles, and batches of the shadow's time ratio
_WINDOW = 10.0  # seconds over which the rates of the page are computed


class ShadowMetrics:
    """Agreement of a shadow with the served engine, and the times of both; for the event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter = partial(Counter, namespace="eps_shadow", registry=registry)
        histogram = partial(Histogram, namespace="eps_shadow", registry=registry, buckets=_SECONDS)
        self._ratios: deque[float] = deque(maxlen=_RECENT)
        self._images = counter("images", "Images that both engines answered.")
        self._disagreements = counter("disagreements", "Images whose best labels differ.")
        self._dropped = counter("dropped_images", "Images for which the shadow had no room.")
        self._failures = counter("failures", "Batches at which the shadow failed.")
        self._seconds = histogram("inference_seconds", "Time of a batch on the shadow's engine.")
        self._served_seconds = histogram(
            "served_seconds", "Time of the same batches on the served engine."
        )

    def compared(self, batch: ShadowBatch) -> None:
        """Count a batch that was sampled for the shadow."""
        if batch.outcome == "dropped":
            self._dropped.inc(batch.images)
        elif batch.outcome == "failed":
            self._failures.inc()
        else:
            self._ratios.append(batch.seconds / batch.served)
            self._images.inc(batch.images)
            self._disagreements.inc(batch.disagreed)
            self._seconds.observe(batch.seconds)
            self._served_seconds.observe(batch.served)

    def figures(self) -> dict[str, Any]:
        """Plain data; `time_ratio`: median of shadow over served, of the last 1000 batches."""
        images, disagreements = _count(self._images), _count(self._disagreements)
        return {
            "images": images,
            "disagreements": disagreements,
            "disagreement": disagreements / images if images else None,
            "time_ratio": statistics.median(self._ratios) if self._ratios else None,
            "dropped_images": _count(self._dropped),
            "failed_batches": _count(self._failures),
        }


def _count(counter: Counter) -> int:
    (metric,) = counter.collect()
    return int(metric.samples[0].value)


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

    `queued` returns the images that wait, `held` the bytes of request bodies that are held.
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
        counter = partial(Counter, namespace="eps", registry=self._registry)
        gauge = partial(Gauge, namespace="eps", registry=self._registry)
        histogram = partial(Histogram, namespace="eps", registry=self._registry, buckets=_SECONDS)
        self._requests = counter("requests", "Answers sent.", ("endpoint", "code"))
        self._refusals = counter("refusals", "Requests refused.", ("reason",))
        self._images = counter("images", "Images answered by the engine.")
        self._failures = counter("engine_failures", "Batches at which the engine failed.")
        self._not_finite = counter(
            "not_finite_images", "Images refused because their logits are not finite."
        )
        self._took = histogram("request_seconds", "From headers to answer.")
        self._waited = histogram("queue_seconds", "Time of a request in the queue.")
        self._computed = histogram("inference_seconds", "Engine time of a batch.")
        self._batch = histogram("batch_size", "Images in a batch.", buckets=_BATCHES)
        gauge("queue_images", "Images that are waiting.").set_function(queued)
        gauge("connections", "Open connections of HTTP.").set_function(connections)
        gauge("ready", "1 when requests are answered.").set_function(ready)
        gauge("body_bytes", "Bytes of request bodies held.").set_function(held)
        self._shadow = ShadowMetrics(self._registry) if shadow else None
        # The same by Triton's names, for its dashboards and autoscalers. Triton's counters do not
        # end in _total, so they cannot be declared as counters.
        totals = self.totals
        for name, text, read in (
            ("request_success", "Successful requests", lambda: totals.success.count),
            ("request_failure", "Refused or failed requests", lambda: totals.fail.count),
            ("count", "Images inferred", lambda: totals.images),
            ("exec_count", "Batches executed", lambda: totals.batches),
            ("request_duration_us", "Microseconds of requests", lambda: totals.success.ns // 1000),
            ("queue_duration_us", "Microseconds in the queue", lambda: totals.queue.ns // 1000),
            (
                "compute_infer_duration_us",
                "Microseconds of inference",
                lambda: totals.compute.ns // 1000,
            ),
            ("pending_request_count", "Images that are waiting", queued),
        ):
            told = f"{text} (Triton's name)"
            gauge(name, told, namespace="nv_inference").set_function(read)

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

    def statistics(self, model: Signature) -> dict[str, Any]:
        """The model's statistics as Triton has them."""
        totals = self.totals
        none = asdict(Statistic())
        batches = [
            {
                "batch_size": size,
                "compute_input": none,
                "compute_infer": asdict(statistic),
                "compute_output": none,
            }
            for size, statistic in sorted(totals.by_batch.items())
        ]
        entry = {
            "name": model.name,
            "version": model.version,
            "last_inference": int(totals.last * 1000),
            "inference_count": totals.images,
            "execution_count": totals.batches,
            "inference_stats": {
                "success": asdict(totals.success),
                "fail": asdict(totals.fail),
                "queue": asdict(totals.queue),
                "compute_input": none,
                "compute_infer": asdict(totals.compute),
                "compute_output": none,
            },
            "batch_stats": batches,
        }
        return {"model_stats": [entry]}

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
