"""Turns with sides that take made-up time on a made-up clock."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from eps_deploy.measuring.interleaving import Block, interleave, plan, wall


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


def test_three_sides_go_there_and_back() -> None:
    machine = Machine()
    sides = [machine.side(name, lambda run: 0.001) for name in "ABC"]
    turns = interleave(sides, budget=1, clock=machine)
    length = turns.runs + 2  # two runs at the start of each block are not counted
    timed = machine.diary[-3 * turns.blocks * length :]
    assert "".join(timed[::length])[:9] == "ABCCBAABC"
    assert [len(blocks) for blocks in turns.times] == [turns.blocks] * 3
    assert all(len(block) == turns.runs for blocks in turns.times for block in blocks)


def test_one_side_alone() -> None:
    machine = Machine()
    turns = interleave([machine.side("A", lambda run: 0.001)], budget=1, clock=machine)
    assert np.concatenate(turns.times[0]) == pytest.approx(0.001)


def test_somebody_looks_at_the_machine_after_each_round() -> None:
    machine = Machine()
    looks: list[int] = []
    sides = [machine.side(name, lambda run: 0.001) for name in "AB"]
    turns = interleave(
        sides, budget=1, clock=machine, between=lambda: looks.append(len(machine.diary))
    )
    assert len(looks) == turns.blocks
    assert looks[-1] == len(machine.diary)


def test_a_machine_that_stalls_ends_the_measurement_after_five_blocks() -> None:
    """The plan was made at 1 ms a run; then each run takes a second."""
    machine = Machine()
    sides = [machine.side(n, lambda run: 0.001 if run < 300 else 1.0) for n in "AB"]
    turns = interleave(sides, budget=2, clock=machine)
    assert turns.blocks == 5


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
    ("seconds", "turn", "expected"),
    [
        (0.0, 1.0, (5, 1)),
        (-3.0, 1.0, (5, 1)),
        (10.0, 1e-6, (20, 200)),
        (1.0, 0.01, (5, 18)),
        (2.0, 0.01, (9, 20)),
        (8.0, 0.01, (20, 38)),
    ],
)
def test_more_blocks_come_before_longer_ones(
    seconds: float, turn: float, expected: tuple[int, int]
) -> None:
    assert plan(seconds, turn) == expected
