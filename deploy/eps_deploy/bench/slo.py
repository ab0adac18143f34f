"""`eps-bench --slo-ms`: the batch size with most throughput whose p99 keeps a limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eps_compact.interleaving import Clock, interleave, wall
from eps_deploy.bench.subject import BenchError, Subject
from eps_deploy.measuring.latency import P99_RUNS, percentiles, rate

LARGEST = 1024  # images in a batch
_STEP = 16  # bisection ends at a sixteenth of the batch size
_TRIAL = 3  # runs that tell at once of a batch that is far too large


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """One batch size.

    Attributes:
        batch: images in a call.
        passed: whether the 99th percentile is within the limit.
        ms: percentiles; None when it did not run at all.
        rate: images a second; None likewise.
        runs: that were timed; below 200 the 99th percentile is unreliable.
        failure: why it did not run.
    """

    batch: int
    passed: bool
    ms: dict[str, float] | None
    rate: float | None
    runs: int
    failure: str | None = None

    @property
    def p99_reliable(self) -> bool:
        return self.runs >= P99_RUNS

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "p99_reliable": self.p99_reliable}


def sweep(
    subject: Subject,
    limit_ms: float,
    *,
    seconds: float,
    clock: Clock = time.perf_counter,
    report: Callable[[Tried], object] = lambda tried: None,
) -> list[Tried]:
    """Try batches of 1, 2, 4, ... until one misses the limit, then between the last two.

    A smaller batch may well have more throughput: :func:`best` looks at all that passed.

    Args:
        subject: what is timed.
        limit_ms: for the 99th percentile of whole calls, in milliseconds.
        seconds: to spend at most on each batch size.
        clock: seconds; a test passes its own.
        report: is told of each batch size.

    Raises:
        BenchError: the file takes one batch size only, or does not run at all.
    """
    smallest, most = subject.batches
    if smallest == most:
        raise BenchError(
            f"{subject.name}: takes batches of exactly {smallest} images: there is nothing to"
            " choose with --slo-ms; export it with a dynamic batch"
        )
    largest = min(most or LARGEST, LARGEST)
    found: list[Tried] = []

    def attempt(batch: int) -> bool:
        tried = _try(subject, batch, limit_ms, seconds, clock)
        if tried.failure and not found:
            raise BenchError(tried.failure)
        found.append(tried)
        report(tried)
        return tried.passed

    good, batch = 0, smallest
    while attempt(batch):
        good = batch
        if batch == largest:
            return found
        batch = min(2 * batch, largest)
    bad = batch
    while good and bad - good > max(1, good // _STEP):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if attempt(middle) else (good, middle)
    return found


def best(tried: Sequence[Tried]) -> Tried | None:
    """The one with most throughput of those that passed; None when none did."""
    return max((each for each in tried if each.passed), key=lambda t: t.rate or 0, default=None)


def _try(subject: Subject, batch: int, limit_ms: float, seconds: float, clock: Clock) -> Tried:
    try:
        side = wall(subject.call(batch), clock)
        times = [side(_TRIAL)]
        if 1000 * float(times[0].min()) <= limit_ms:
            times = interleave([side], budget=seconds, clock=clock).times[0]
    except BenchError as error:
        return Tried(batch=batch, passed=False, ms=None, rate=None, runs=0, failure=str(error))
    ms = percentiles(times)
    return Tried(
        batch=batch,
        passed=ms["p99"] <= limit_ms,
        ms=ms,
        rate=rate(times, batch),
        runs=sum(len(block) for block in times),
    )
