"""Turns with sides that take made-up time on a made-up clock."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from eps_core.interleave import Block, interleave, plan, wall


class Machine:
    """A clock, and calls that move it on and write their name into a diary."""

    def __init__(self) -> None:
        self.now = 100.0
        self.diary: list[str] = []
        self.runs = 0

    def __call__(self) -> float:
        return self.now

    def side(self, name: str, seconds: Callable[[int], float]) -> Block:
        def call() -> None:
            self.now += seconds(self.runs)
            self.runs += 1
            self.diary.append(name)

        return wall(call, self)


def test_each_side_comes_after_another_one() -> None:
    machine = Machine()
    sides = [machine.side(name, lambda run: 0.001) for name in "ABC"]
    turns = interleave(sides, budget=2, clock=machine)
    length = 2 * turns.runs  # as many runs at the start of each block are not counted
    timed = machine.diary[-3 * turns.blocks * length :]
    assert "".join(timed[::length])[:9] == "ABCABCABC"
    assert [len(blocks) for blocks in turns.times] == [turns.blocks] * 3
    assert all(len(block) == turns.runs for blocks in turns.times for block in blocks)


def test_what_a_side_costs_because_another_one_had_the_caches_is_not_counted() -> None:
    """Ten runs after the other one, it is as fast as it ever is."""
    machine = Machine()

    def seconds(name: str) -> float:
        since = "".join(machine.diary)[::-1]
        own = len(since) - len(since.lstrip(name))
        return 0.002 if own < 10 else 0.001

    sides = [machine.side(name, lambda run, name=name: seconds(name)) for name in "AB"]  # type: ignore[misc]
    turns = interleave(sides, budget=2, clock=machine)
    assert np.concatenate(turns.times).min() == pytest.approx(0.001)
    assert np.concatenate(turns.times).max() == pytest.approx(0.001)


def test_one_side_alone() -> None:
    machine = Machine()
    turns = interleave([machine.side("A", lambda run: 0.001)], budget=1, clock=machine)
    assert np.concatenate(turns.times[0]) == pytest.approx(0.001)


def test_somebody_looks_at_the_machine_now_and_then_and_in_the_end() -> None:
    """To look takes its time, and disturbs: not after each of many short blocks."""
    machine = Machine()
    looks: list[float] = []
    sides = [machine.side(name, lambda run: 0.001) for name in "AB"]
    turns = interleave(sides, budget=1, clock=machine, between=lambda: looks.append(machine.now))
    assert turns.blocks > 2 * len(looks) > 8
    assert looks[-1] == machine.now


def test_what_comes_and_goes_meets_both_of_a_pair() -> None:
    """A machine that is half as fast for a quarter of a second, and then again not."""
    machine = Machine()
    sides = [
        machine.side(name, lambda run: 0.001 * (1 + int(4 * machine.now) % 2)) for name in "AB"
    ]
    turns = interleave(sides, budget=5, clock=machine)
    first, second = (np.array([np.median(block) for block in times]) for times in turns.times)
    assert np.isclose(first, second, rtol=1e-3).mean() > 0.85


def test_a_machine_that_stalls_ends_the_measurement_after_six_blocks() -> None:
    """The plan was made at 1 ms a run; then each run takes a second."""
    machine = Machine()
    sides = [machine.side(n, lambda run: 0.001 if run < 300 else 1.0) for n in "AB"]
    turns = interleave(sides, budget=2, clock=machine)
    assert turns.blocks == 6


def test_a_side_with_a_clock_of_its_own_is_planned_at_what_it_costs() -> None:
    """It says a microsecond, and takes ten milliseconds of the budget."""
    machine = Machine()

    def block(runs: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        machine.now += 0.01 * runs
        return np.full(runs, 1e-6)

    turns = interleave([block], budget=2, clock=machine)
    assert machine.now - 100 <= 2.1
    assert np.concatenate(turns.times[0]) == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("seconds", "turn", "settling", "expected"),
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
    seconds: float, turn: float, settling: float, expected: tuple[int, int]
) -> None:
    assert plan(seconds, turn, settling) == expected
