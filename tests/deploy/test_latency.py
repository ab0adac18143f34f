"""Latency with engines that take made-up time on a made-up clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from eps_deploy import latency
from eps_deploy.engines.base import Images, Logits

IMAGES = np.zeros((4, 1, 8, 8), np.uint8)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeEngine:
    """Takes `seconds(run)` for its n-th run, and writes its name into a shared diary."""

    input_shape = (1, 8, 8)
    classes = 10
    max_batch = 256

    def __init__(
        self, clock: Clock, seconds: Callable[[int], float], diary: list[str], name: str
    ) -> None:
        self._clock, self._seconds, self._diary, self._name = clock, seconds, diary, name
        self.runs = 0

    def infer(self, images: Images) -> Logits:
        self._clock.now += self._seconds(self.runs)
        self.runs += 1
        self._diary.append(self._name)
        return np.zeros((len(images), 10), np.float32)

    def describe(self) -> dict[str, Any]:
        return {}

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def measure(
    baseline: Callable[[int], float], compact: Callable[[int], float], budget: float
) -> tuple[latency.Latency, list[str], float]:
    clock = Clock()
    diary: list[str] = []
    found = latency.measure(
        FakeEngine(clock, baseline, diary, "B"),
        FakeEngine(clock, compact, diary, "C"),
        IMAGES,
        budget=budget,
        clock=clock,
    )
    return found, diary, clock.now - 100.0


def test_constant_times_come_out_exactly() -> None:
    found, _, _ = measure(lambda run: 0.004, lambda run: 0.002, budget=5)
    assert found.batch == 4
    assert found.baseline_ms == pytest.approx({"p50": 4, "p90": 4, "p95": 4, "p99": 4})
    assert found.compact_ms == pytest.approx({"p50": 2, "p90": 2, "p95": 2, "p99": 2})
    speedup = found.speedup
    assert (speedup.low, speedup.value, speedup.high) == pytest.approx((2, 2, 2))
    assert found.warm
    assert found.p99_reliable


def test_the_budget_is_kept() -> None:
    for budget in (0.5, 2.0, 10.0):
        _, _, spent = measure(lambda run: 0.004, lambda run: 0.002, budget)
        assert spent <= budget * 1.05


def test_a_budget_of_nothing_still_makes_five_blocks() -> None:
    found, _, _ = measure(lambda run: 1.0, lambda run: 0.5, budget=0)
    assert (found.blocks, found.runs) == (5, 1)
    assert found.speedup.value == pytest.approx(2)
    assert not found.p99_reliable


def test_the_two_engines_take_turns() -> None:
    """After the warm-up: BB.. CC.. CC.. BB.. BB.., so that a drift of the machine meets both."""
    found, diary, _ = measure(lambda run: 0.004, lambda run: 0.002, budget=1)
    length = found.runs + 2  # two runs at the start of each block are not counted
    timed = diary[-2 * found.blocks * length :]
    blocks = ["".join(sorted(set(timed[at : at + length]))) for at in range(0, len(timed), length)]
    assert "".join(blocks[:8]) == "BCCBBCCB"
    assert blocks.count("B") == blocks.count("C") == found.blocks


def test_a_steady_drift_of_the_machine_does_not_bias_the_ratio() -> None:
    """Both get slower by half over the measurement; the ratio stays 2."""
    clock = Clock()
    diary: list[str] = []

    def slowdown() -> float:
        return 1 + 0.1 * (clock.now - 100.0)

    found = latency.measure(
        FakeEngine(clock, lambda run: 0.004 * slowdown(), diary, "B"),
        FakeEngine(clock, lambda run: 0.002 * slowdown(), diary, "C"),
        IMAGES,
        budget=5,
        clock=clock,
    )
    assert found.speedup.value == pytest.approx(2, rel=0.02)


def test_cold_runs_are_not_counted() -> None:
    """The first thirty runs are far slower, as after loading a network."""
    found, _, _ = measure(
        lambda run: 0.03 if run < 30 else 0.004, lambda run: 0.02 if run < 30 else 0.002, budget=10
    )
    assert found.warm
    assert found.baseline_ms["p99"] == pytest.approx(4)


def test_times_that_never_settle_are_reported() -> None:
    found, _, _ = measure(
        lambda run: 0.001 * (1 + run // 5 % 2), lambda run: 0.001 * (1 + run // 5 % 2), budget=1
    )
    assert not found.warm


def test_the_machine_that_stalls_ends_the_measurement_after_five_blocks() -> None:
    """The plan was made at 1 ms a run; then each run takes a second."""
    found, _, _ = measure(
        lambda run: 0.001 if run < 80 else 1.0, lambda run: 0.001 if run < 80 else 1.0, budget=1
    )
    assert found.blocks == 5


@pytest.mark.parametrize(
    ("seconds", "pair", "expected"),
    [
        (0.0, 1.0, (5, 1)),
        (-3.0, 1.0, (5, 1)),
        (10.0, 1e-6, (20, 200)),
        (1.0, 0.01, (5, 18)),
        (2.0, 0.01, (9, 20)),
        (8.0, 0.01, (20, 38)),
    ],
)
def test_plan(seconds: float, pair: float, expected: tuple[int, int]) -> None:
    assert latency.plan(seconds, pair) == expected
