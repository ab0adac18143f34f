"""Interleaved timing of calls that advance a fake clock."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from eps_core.timing import Runs, TimeRuns, interleave, plan, wall_clock


class Machine:
    """A clock, and calls that advance it and append their name to a log."""

    def __init__(self) -> None:
        self.now = 100.0
        self.log: list[str] = []
        self.runs = 0

    def __call__(self) -> float:
        return self.now

    def timed(self, name: str, seconds: Callable[[int], float]) -> TimeRuns:
        def call() -> None:
            self.now += seconds(self.runs)
            self.runs += 1
            self.log.append(name)

        return wall_clock(call, self)


def test_calls_take_turns_in_blocks() -> None:
    machine = Machine()
    calls = [machine.timed(name, lambda run: 0.001) for name in "ABC"]
    found = interleave(calls, budget=2, clock=machine)
    blocks, runs = found.times[0].shape
    length = 2 * runs  # as many runs at the start of each block are discarded
    timed = machine.log[-3 * blocks * length :]
    assert "".join(timed[::length])[:9] == "ABCABCABC"
    assert [times.shape for times in found.times] == [(blocks, runs)] * 3


def test_runs_with_cold_caches_are_discarded() -> None:
    """A call reaches full speed ten runs after the other one."""
    machine = Machine()

    def seconds(name: str) -> float:
        since = "".join(machine.log)[::-1]
        own = len(since) - len(since.lstrip(name))
        return 0.002 if own < 10 else 0.001

    calls = [machine.timed(name, lambda run, name=name: seconds(name)) for name in "AB"]  # type: ignore[misc]
    found = interleave(calls, budget=2, clock=machine)
    assert np.concatenate(found.times).min() == pytest.approx(1)
    assert np.concatenate(found.times).max() == pytest.approx(1)


def test_a_single_call() -> None:
    machine = Machine()
    found = interleave([machine.timed("A", lambda run: 0.001)], budget=1, clock=machine)
    assert found.times[0] == pytest.approx(1)
    assert found.warm


def test_between_is_called_every_tenth_of_a_second_and_at_the_end() -> None:
    """It takes time and disturbs: not after each of many short blocks."""
    machine = Machine()
    polls: list[float] = []
    calls = [machine.timed(name, lambda run: 0.001) for name in "AB"]
    found = interleave(calls, budget=1, clock=machine, between=lambda: polls.append(machine.now))
    assert len(found.times[0]) > 2 * len(polls) > 8
    assert polls[-1] == machine.now


def test_both_blocks_of_a_pair_meet_the_same_disturbance() -> None:
    """The machine is half as fast every other quarter of a second."""
    machine = Machine()
    calls = [
        machine.timed(name, lambda run: 0.001 * (1 + int(4 * machine.now) % 2)) for name in "AB"
    ]
    found = interleave(calls, budget=5, clock=machine)
    first, second = (np.median(times, axis=1) for times in found.times)
    assert np.isclose(first, second, rtol=1e-3).mean() > 0.85


def test_a_stalling_machine_ends_the_measurement_after_six_blocks() -> None:
    """The plan assumes 1 ms a run; then each run takes a second."""
    machine = Machine()
    calls = [machine.timed(n, lambda run: 0.001 if run < 300 else 1.0) for n in "AB"]
    found = interleave(calls, budget=2, clock=machine)
    assert len(found.times[0]) == 6


def test_a_call_with_its_own_clock_is_planned_by_the_budget_it_takes() -> None:
    """It reports a microsecond, and takes ten milliseconds of the budget."""
    machine = Machine()

    def time_runs(runs: int) -> Runs:
        machine.now += 0.01 * runs
        return np.full(runs, 1e-6)

    found = interleave([time_runs], budget=2, clock=machine)
    assert machine.now - 100 <= 2.1
    assert found.times[0] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("seconds", "turn", "discarded", "expected"),
    [
        (0.0, 1.0, 2, (6, 1)),
        (-3.0, 1.0, 2, (6, 1)),
        (10.0, 1e-6, 10, (500, 10)),
        (0.3, 0.01, 2, (6, 3)),
        (0.3, 0.01, 10, (6, 2)),
        (2.0, 0.01, 2, (16, 10)),
        (2.0, 0.01, 10, (10, 10)),
    ],
)
def test_blocks_are_short_and_many(
    seconds: float, turn: float, discarded: float, expected: tuple[int, int]
) -> None:
    assert plan(seconds, turn, discarded) == expected
