"""What is counted of a shadow: agreement and engine times, beside the served engine's."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

from prometheus_client import Counter, Histogram
from prometheus_client.registry import CollectorRegistry

from eps_deploy.serving.shadow import Compared

_RECENT = 1000  # batches that the ratio of times is of


class ShadowMetrics:
    """For one thread: the event loop's.

    Args:
        registry: of Prometheus.
        seconds: buckets of the engines' times.
    """

    def __init__(self, registry: CollectorRegistry, seconds: tuple[float, ...]) -> None:
        self._images = 0
        self._disagreed = 0
        self._dropped = 0
        self._failed = 0
        self._ratios: deque[float] = deque(maxlen=_RECENT)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"eps_shadow_{name}", text, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"eps_shadow_{name}", text, buckets=seconds, registry=registry)

        self._all = counter("images", "Images that both engines answered.")
        self._differing = counter("disagreements", "Images of which the best labels differ.")
        self._lost = counter("dropped_images", "Images for which the shadow had no room.")
        self._failures = counter("failures", "Batches at which the shadow failed.")
        self._took = histogram("inference_seconds", "The shadow's engine time of a batch.")
        self._served = histogram("served_seconds", "The served engine's, of the same batches.")

    def compared(self, batch: Compared) -> None:
        """A batch that was drawn for the shadow is done, or was dropped."""
        if batch.outcome == "dropped":
            self._dropped += batch.images
            self._lost.inc(batch.images)
        elif batch.outcome == "failed":
            self._failed += 1
            self._failures.inc()
        else:
            self._images += batch.images
            self._disagreed += batch.disagreed
            self._ratios.append(batch.seconds / batch.served)
            self._all.inc(batch.images)
            self._differing.inc(batch.disagreed)
            self._took.observe(batch.seconds)
            self._served.observe(batch.served)

    def figures(self) -> dict[str, Any]:
        """Plain data; the ratio is the median of the last 1000 batches, shadow over served."""
        return {
            "images": self._images,
            "disagreements": self._disagreed,
            "disagreement": self._disagreed / self._images if self._images else None,
            "time_ratio": statistics.median(self._ratios) if self._ratios else None,
            "dropped_images": self._dropped,
            "failed_batches": self._failed,
        }
