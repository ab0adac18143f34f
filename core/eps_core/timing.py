"""Interleaved timing: warm up several calls in one process, then time them in alternating blocks.

Whatever else the machine does comes and goes within a tenth of a second. Short alternating blocks
expose all calls to it alike, so that ratios of block medians stay true. A block follows one of
another call, which has evicted its caches; its first runs are therefore discarded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MIN_BLOCKS = 6  # fewer have no 95 % interval
MAX_BLOCKS = 500
MAX_RUNS = 10  # in a block

# Warm-up ends when two windows of runs in a row have medians within 5 %, but not before ten windows
# and the time that a GPU needs to raise its clocks (trtexec waits as long); or when its share of
# the budget is spent.
_WINDOW = 5
_MIN_WINDOWS = 10
_LEAST_WINDOWS = 3  # whatever the budget
_MIN_SECONDS = 0.2
_FLAT = 0.05
_WARM_UP_SHARE = 0.2

# Discarded runs at the start of a block. A network of 1 ms and 7 MB took 1.7 times as long in its
# first run after another such network, and ten runs until it was at full speed.
_SETTLING = 0.015  # seconds
_LEAST_DISCARDED = 2
_POLL = 0.1  # seconds between two calls of `between`
_INSTANT = 1e-9

Clock = Callable[[], float]
Runs = npt.NDArray[np.float64]
TimeRuns = Callable[[int], Runs]
"""Does something `runs` times and returns the seconds that each run took, `[runs]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Times of several calls, measured in turns."""

    times: list[Runs]  # for each call, milliseconds of every run, float64 `[blocks, runs]`
    warm: bool  # whether every warm-up became flat before its share of the budget was spent


def wall_clock(call: Callable[[], object], clock: Clock = time.perf_counter) -> TimeRuns:
    """Time a call that returns when its work is done."""

    def time_runs(runs: int) -> Runs:
        times = np.empty(runs)
        for index in range(runs):
            began = clock()
            call()
            times[index] = clock() - began
        return times

    return time_runs


def interleave(
    calls: Sequence[TimeRuns],
    *,
    budget: float,
    clock: Clock = time.perf_counter,
    between: Callable[[], object] | None = None,
) -> Timings:
    """Time `calls` in alternating blocks.

    Args:
        calls: at least one. A call may measure by a clock of its own, such as a GPU's events.
        budget: seconds to spend, warm-up included; six blocks of one run are made in any case.
        clock: seconds, to keep the budget; a parameter for tests.
        between: called between blocks every tenth of a second, and after the last block.
    """
    deadline = clock() + budget
    timers = [_Timer(call, clock, alone=len(calls) == 1) for call in calls]
    warm = [timer.warm_up(budget * _WARM_UP_SHARE / len(calls)) for timer in timers]
    turn = sum(timer.cost for timer in timers)
    discarded = sum(timer.discarded * timer.cost for timer in timers) / max(turn, _INSTANT)
    blocks, runs = plan(deadline - clock(), turn, discarded)
    times: list[list[Runs]] = [[] for _ in calls]
    polled = clock()
    for index in range(blocks):
        if index >= MIN_BLOCKS and clock() > deadline:
            break
        for timer, found in zip(timers, times, strict=True):
            found.append(timer.block(runs))
        if between is not None and clock() - polled >= _POLL:
            between()
            polled = clock()
    if between is not None:
        between()
    return Timings(times=[1000 * np.stack(found) for found in times], warm=all(warm))


def plan(seconds: float, turn: float, discarded: float) -> tuple[int, int]:
    """Return the number of blocks of each call, and of runs in a block, that take `seconds`.

    `turn` is seconds of one run of every call; the first `discarded` runs of a block do not count.
    """
    turns = max(seconds, 0.0) / max(turn, _INSTANT)
    blocks = min(max(int(turns / (MAX_RUNS + discarded)), MIN_BLOCKS), MAX_BLOCKS)
    room = turns / blocks
    return blocks, min(max(int(max(room - discarded, room / 2)), 1), MAX_RUNS)


@dataclass(slots=True)
class _Timer:
    """Warm-up and blocks of one call; `alone` when it takes turns with no other."""

    call: TimeRuns
    clock: Clock
    alone: bool
    # Seconds of the budget that a run costs, known after `warm_up`. A call that measures by a clock
    # of its own reports less.
    cost: float = 0.0

    def warm_up(self, budget: float) -> bool:
        """Run until two windows in a row take as long; return False if `budget` ends before."""
        began = self.clock()
        deadline, earliest = began + budget, began + min(_MIN_SECONDS, budget)
        previous = self._window(1)
        # Shorter windows for a slow network, or its warm-up would take the whole budget.
        width = int(budget / (_MIN_WINDOWS * max(self.cost, _INSTANT)))
        costs: list[float] = []
        while True:
            median = self._window(min(max(width, 1), _WINDOW))
            costs.append(self.cost)
            flat = abs(median - previous) <= _FLAT * previous
            previous, now = median, self.clock()
            settled = flat and len(costs) >= _MIN_WINDOWS and now >= earliest
            if settled or (now >= deadline and len(costs) >= _LEAST_WINDOWS):
                self.cost = float(np.median(costs[-_LEAST_WINDOWS:]))
                return flat

    def _window(self, runs: int) -> float:
        """Return the median of `runs` runs, and set `cost`."""
        began = self.clock()
        median = float(np.median(self.call(runs)))
        self.cost = (self.clock() - began) / runs
        return median

    @property
    def discarded(self) -> int:
        """Runs at the start of a block that do not count; 0 when nothing else takes the caches."""
        if self.alone:
            return 0
        wanted = math.ceil(_SETTLING / max(self.cost, _INSTANT))
        return min(max(wanted, _LEAST_DISCARDED), MAX_RUNS)

    def block(self, runs: int) -> Runs:
        if self.discarded:
            self.call(min(self.discarded, runs))
        return self.call(runs)
