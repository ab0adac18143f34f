"""Timing several things in turns: warmed up until flat, then alternating blocks of runs.

All run in alternating blocks in one process, so that whatever else the machine does meets all of
them alike. The blocks are short, as what disturbs a machine comes and goes within a tenth of a
second, and has to meet both blocks of a pair. Each of them follows on a block of something else,
which has taken the caches: runs at its start are not counted until it has got them back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MIN_BLOCKS = 6  # fewer than that have no 95 % interval
MAX_BLOCKS = 500
MAX_RUNS = 10  # in a block

# Warm-up ends when, after ten windows of runs and the time that a GPU needs to raise its clocks
# (trtexec waits as long), two windows in a row have medians within 5 %; or when its share of the
# budget is spent.
_WINDOW = 5
_MIN_WINDOWS = 10
_LEAST_WINDOWS = 3  # whatever the budget
_MIN_SECONDS = 0.2
_FLAT = 0.05
_WARM_UP_SHARE = 0.2

# Runs at the start of a block that are not counted. A network of 1 ms and 7 MB took 1.7 times as
# long in its first run after another such network, and ten runs until it was as fast as ever.
_SETTLING = 0.015  # seconds
_LEAST_DISCARDED = 2
_LOOK = 0.1  # seconds between two looks at the machine
_INSTANT = 1e-9

Clock = Callable[[], float]
Runs = npt.NDArray[np.float64]
Block = Callable[[int], Runs]
"""Does something so many times, and returns what each time took, in seconds `[runs]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """What was measured.

    Attributes:
        times: for each of what was timed, its blocks, each the seconds of its runs `[runs]`.
        runs: in each block.
        warm: for each, whether the warm-up became flat before its time was over.
    """

    times: list[list[Runs]]
    runs: int
    warm: list[bool]

    @property
    def blocks(self) -> int:
        return len(self.times[0])


def wall(call: Callable[[], object], clock: Clock = time.perf_counter) -> Block:
    """A block of calls that return when their work is done, timed from outside."""

    def block(runs: int) -> Runs:
        times = np.empty(runs)
        for index in range(runs):
            began = clock()
            call()
            times[index] = clock() - began
        return times

    return block


def interleave(
    sides: Sequence[Block],
    *,
    budget: float,
    clock: Clock = time.perf_counter,
    between: Callable[[], object] | None = None,
) -> Turns:
    """Time `sides` in turns.

    Args:
        sides: what is timed, at least one. A side may measure on a clock of its own (a GPU's
            events); `clock` is only asked how the budget stands.
        budget: seconds to spend, warm-up included; six blocks of one run are made in any case.
        clock: seconds; a test passes its own.
        between: called between blocks now and then, and at the end, while the machine is as busy as
            it gets.
    """
    deadline = clock() + budget
    timers = [_Timer(side, clock, alone=len(sides) == 1) for side in sides]
    warm = [timer.warm_up(budget * _WARM_UP_SHARE / len(sides)) for timer in timers]
    turn = sum(timer.typical for timer in timers)
    settling = sum(timer.discarded * timer.typical for timer in timers) / max(turn, _INSTANT)
    blocks, runs = plan(deadline - clock(), turn, settling)
    times: list[list[Runs]] = [[] for _ in sides]
    looked = clock()
    for index in range(blocks):
        if index >= MIN_BLOCKS and clock() > deadline:
            break
        for timer, found in zip(timers, times, strict=True):
            found.append(timer.block(runs))
        if between is not None and clock() - looked >= _LOOK:
            between()
            looked = clock()
    if between is not None:
        between()
    return Turns(times=times, runs=runs, warm=warm)


def plan(seconds: float, turn: float, settling: float) -> tuple[int, int]:
    """Blocks of each side, and runs in each.

    Args:
        seconds: to spend.
        turn: seconds of one run of all sides.
        settling: runs at the start of a block that are not counted.
    """
    turns = max(seconds, 0.0) / max(turn, _INSTANT)
    blocks = min(max(int(turns / (MAX_RUNS + settling)), MIN_BLOCKS), MAX_BLOCKS)
    room = turns / blocks
    return blocks, min(max(int(max(room - settling, room / 2)), 1), MAX_RUNS)


class _Timer:
    def __init__(self, side: Block, clock: Clock, *, alone: bool) -> None:
        self._side = side
        self._alone = alone
        self._clock = clock
        # Seconds of the budget that a run costs, known after warm_up; more than what a side says
        # that measures on a clock of its own.
        self.typical = 0.0

    def warm_up(self, budget: float) -> bool:
        """Run until two windows in a row take as long; False if they never did in `budget`."""
        began = self._clock()
        deadline, earliest = began + budget, began + min(_MIN_SECONDS, budget)
        previous = self._window(1)
        # A slow network gets shorter windows: it must not spend the whole budget on warming up.
        width = int(budget / (_MIN_WINDOWS * max(self.typical, _INSTANT)))
        costs: list[float] = []
        while True:
            median = self._window(min(max(width, 1), _WINDOW))
            costs.append(self.typical)
            flat = abs(median - previous) <= _FLAT * previous
            previous, now = median, self._clock()
            settled = flat and len(costs) >= _MIN_WINDOWS and now >= earliest
            if settled or (now >= deadline and len(costs) >= _LEAST_WINDOWS):
                self.typical = float(np.median(costs[-_LEAST_WINDOWS:]))
                return flat

    def _window(self, runs: int) -> float:
        """Median of so many runs as the side measures it; `typical` is what one costs in all."""
        began = self._clock()
        median = float(np.median(self._side(runs)))
        self.typical = (self._clock() - began) / runs
        return median

    @property
    def discarded(self) -> int:
        """Runs at the start of a block that are not counted."""
        if self._alone:
            return 0  # nothing else takes the caches
        wanted = math.ceil(_SETTLING / max(self.typical, _INSTANT))
        return min(max(wanted, _LEAST_DISCARDED), MAX_RUNS)

    def block(self, runs: int) -> Runs:
        if self.discarded:
            self._side(min(self.discarded, runs))
        return self._side(runs)
