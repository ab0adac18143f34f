"""Latency of two engines measured against each other: warmed up, interleaved, with an interval.

The two run in alternating blocks in one process, so that whatever else the machine does meets both
alike; the order within a pair of blocks alternates too. Times are of whole calls of `Engine.infer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eps_compact.intervals import Interval, ratio_of_medians
from eps_deploy.engines.base import Engine, Images

BATCHES = (1, 16)
MIN_BLOCKS = 5
MAX_BLOCKS = 20
MAX_RUNS = 200  # in a block
_GOOD_RUNS = 20  # blocks are added before they get longer than this
P99_RUNS = 200  # below this the 99th percentile is one or two runs
_PERCENTILES = (50, 90, 95, 99)

# Warm-up ends when, after ten windows of runs, two in a row have medians within 5 %, or when a
# fifth of the budget is spent.
_WINDOW = 5
_MIN_WINDOWS = 10
_FLAT = 0.05
_WARM_UP_SHARE = 0.2
_DISCARDED = 2  # first runs of a block: the other engine's caches and spinning threads are about

Clock = Callable[[], float]
Runs = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Times of one batch size in milliseconds a call, by percentile name (`p50`, ...).

    Attributes:
        batch: images in a call.
        baseline_ms, compact_ms: percentiles over all blocks.
        speedup: median of the baseline over median of the compact network, with its interval.
        blocks, runs: blocks of each engine, and runs in each block.
        warm: whether the warm-up became flat before its time was over.
    """

    batch: int
    baseline_ms: dict[str, float]
    compact_ms: dict[str, float]
    speedup: Interval
    blocks: int
    runs: int
    warm: bool

    @property
    def p99_reliable(self) -> bool:
        return self.blocks * self.runs >= P99_RUNS


def measure(
    baseline: Engine,
    compact: Engine,
    images: Images,
    *,
    budget: float,
    clock: Clock = time.perf_counter,
) -> Latency:
    """Time both engines on `images` (uint8 `[N, C, H, W]`), the whole batch in each call.

    Args:
        baseline, compact: the engines, with the same settings.
        images: one batch.
        budget: seconds to spend, warm-up included; five blocks of one run are made in any case.
        clock: seconds; a test passes its own.
    """
    deadline = clock() + budget
    timers = [_Timer(engine, images, clock) for engine in (baseline, compact)]
    warm = [timer.warm_up(budget * _WARM_UP_SHARE / 2) for timer in timers]
    pair = sum(timer.typical for timer in timers)
    blocks, runs = plan(deadline - clock(), pair)
    times: list[list[Runs]] = [[], []]
    for index in range(blocks):
        if index >= MIN_BLOCKS and clock() > deadline:
            break
        order = (0, 1) if index % 2 == 0 else (1, 0)
        for which in order:
            times[which].append(timers[which].block(runs))
    return Latency(
        batch=len(images),
        baseline_ms=_percentiles(times[0]),
        compact_ms=_percentiles(times[1]),
        speedup=ratio_of_medians(times[0], times[1]),
        blocks=len(times[0]),
        runs=runs,
        warm=all(warm),
    )


def plan(seconds: float, pair: float) -> tuple[int, int]:
    """Blocks of each engine and runs in each, when one run of both takes `pair` seconds.

    More blocks come first (the interval lives on them), then longer ones.
    """
    total = int(max(seconds, 0.0) / max(pair, 1e-9))
    blocks = min(max(total // (_GOOD_RUNS + _DISCARDED), MIN_BLOCKS), MAX_BLOCKS)
    return blocks, min(max(total // blocks - _DISCARDED, 1), MAX_RUNS)


class _Timer:
    def __init__(self, engine: Engine, images: Images, clock: Clock) -> None:
        self._engine = engine
        self._images = images
        self._clock = clock
        self.typical = 0.0  # seconds of a run, known after warm_up

    def warm_up(self, budget: float) -> bool:
        """Run until two windows in a row take as long; False if they never did in `budget`."""
        deadline = self._clock() + budget
        windows = 0
        while True:
            previous, self.typical = self.typical, float(np.median(self._window(_WINDOW)))
            windows += 1
            flat = abs(self.typical - previous) <= _FLAT * previous
            if flat and windows >= _MIN_WINDOWS:
                return True
            if self._clock() >= deadline and windows >= 2:
                return flat

    def block(self, runs: int) -> Runs:
        self._window(min(_DISCARDED, runs))
        return self._window(runs)

    def _window(self, runs: int) -> Runs:
        times = np.empty(runs)
        for index in range(runs):
            began = self._clock()
            self._engine.infer(self._images)
            times[index] = self._clock() - began
        return times


def _percentiles(blocks: list[Runs]) -> dict[str, float]:
    values = np.percentile(np.concatenate(blocks) * 1000, _PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(_PERCENTILES, values, strict=True)}
