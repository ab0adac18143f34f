"""The latency of model files against each other: the work behind `eps-bench`.

The first file is the reference. All are loaded in one process and timed in turns; see
:mod:`eps_compact.interleaving`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eps_compact.interleaving import Clock, Runs, interleave, wall
from eps_compact.intervals import Interval, ratio_of_medians
from eps_deploy.bench.subject import BenchError, Subject, refuse_batch
from eps_deploy.measuring.clocks import Conditions, Watch
from eps_deploy.measuring.latency import (
    BATCHES,
    P99_RUNS,
    Verdict,
    noise,
    percentiles,
    rate,
    spread,
    verdict,
)

SCHEMA = 1
WHOLE, DEVICE, END_TO_END = "call", "device", "end_to_end"


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """One way of timing one file at one batch size.

    Attributes:
        ms: milliseconds a call, by percentile name (`p50`, ...).
        rate: images a second over all timed runs, one call after another.
        speedup: median of the reference over the median of this file; None for the reference.
        samples: milliseconds of every run, by block.
    """

    ms: dict[str, float]
    rate: float
    speedup: Interval | None
    samples: list[list[float]]

    @property
    def verdict(self) -> Verdict | None:
        """Of this file against the reference."""
        return None if self.speedup is None else verdict(self.speedup)

    def to_dict(self, *, samples: bool) -> dict[str, Any]:
        found = asdict(self)
        if not samples:
            del found["samples"]
        return {**found, "verdict": self.verdict}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """All files at one batch size.

    Attributes:
        batch: images in a call.
        times: for each file, in order, what was timed: whole calls (`call`), and where it can be
            had for all of them the GPU's own time (`device`) and the way from a picture to a label
            (`end_to_end`).
        blocks, runs: blocks of each, and runs in each block.
        warm: whether every warm-up became flat before its time was over.
        conditions: what else the machine did.
        spread: as `latency.Latency.spread`, of all files.
    """

    batch: int
    times: list[dict[str, Times]]
    blocks: int
    runs: int
    warm: bool
    conditions: Conditions
    spread: float

    @property
    def p99_reliable(self) -> bool:
        return self.blocks * self.runs >= P99_RUNS

    @property
    def noise(self) -> str:
        return noise(self.conditions, self.spread, alone=len(self.times) == 1)

    def to_dict(self, names: Sequence[str], *, samples: bool) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "files": [
                {"file": name, **{way: t.to_dict(samples=samples) for way, t in each.items()}}
                for name, each in zip(names, self.times, strict=True)
            ],
            "blocks": self.blocks,
            "runs_per_block": self.runs,
            "p99_reliable": self.p99_reliable,
            "warm": self.warm,
            "noise": self.noise,
            "conditions": self.conditions.to_dict(),
        }


def choose_batches(subjects: Sequence[Subject], asked: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes to time: those that were asked for, or what all subjects take.

    Raises BenchError when a file does not take what was asked for, or the files have no batch size
    in common.
    """
    if not asked:
        only = {subject.batches for subject in subjects if subject.batches[0] > 1}
        fixed = sorted({smallest for smallest, _ in only})
        if len(fixed) > 1:
            sizes = " and ".join(str(size) for size in fixed)
            raise BenchError(f"the files take fixed batches of {sizes} images; bench them apart")
        largest = min((s.batches[1] for s in subjects if s.batches[1]), default=max(BATCHES))
        asked = fixed or sorted({min(size, largest) for size in BATCHES})
    for subject in subjects:
        for batch in asked:
            refuse_batch(subject, batch)
    return tuple(dict.fromkeys(asked))


def compare(
    subjects: Sequence[Subject],
    batch: int,
    *,
    seconds: float,
    clock: Clock = time.perf_counter,
) -> Bench:
    """Time all subjects in turns at one batch size; the first is the reference.

    Args:
        subjects: at least one.
        batch: images in a call, one that all take.
        seconds: to spend at most; six blocks of one run are made in any case.
        clock: seconds; a test passes its own.
    """
    ways = _ways(subjects, batch, clock)
    keys = [(way, index) for way in ways for index in range(len(subjects))]
    gpu = next((subject.gpu for subject in subjects if subject.gpu is not None), None)
    with Watch(gpu) as watch:
        watch.look()
        turns = interleave(
            [ways[way][index] for way, index in keys],
            budget=seconds,
            clock=clock,
            between=watch.look,
        )
        conditions = watch.conditions()
    blocks = dict(zip(keys, turns.times, strict=True))
    times = [
        {way: _times(blocks[way, 0], blocks[way, index], index, batch) for way in ways}
        for index in range(len(subjects))
    ]
    return Bench(
        batch=batch,
        times=times,
        blocks=turns.blocks,
        runs=turns.runs,
        warm=all(turns.warm),
        conditions=conditions,
        spread=max(spread(blocks[WHOLE, index]) for index in range(len(subjects))),
    )


def _ways(
    subjects: Sequence[Subject], batch: int, clock: Clock
) -> dict[str, list[Callable[[int], Runs]]]:
    """What can be timed of all of them."""
    ways: dict[str, list[Callable[[int], Runs]]] = {
        WHOLE: [wall(subject.call(batch), clock) for subject in subjects]
    }
    device = [side for side in (s.on_device(batch) for s in subjects) if side is not None]
    if len(device) == len(subjects):
        ways[DEVICE] = device
    calls = [call for call in (s.end_to_end(batch) for s in subjects) if call is not None]
    if len(calls) == len(subjects):
        ways[END_TO_END] = [wall(call, clock) for call in calls]
    return ways


def _times(reference: list[Runs], own: list[Runs], index: int, batch: int) -> Times:
    return Times(
        ms=percentiles(own),
        rate=rate(own, batch),
        speedup=ratio_of_medians(reference, own) if index else None,
        samples=[(1000 * block).round(6).tolist() for block in own],
    )
