"""Intervals against closed forms, a brute-force likelihood, published figures and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eps_compact.intervals import (
    Z_95,
    difference_of_medians,
    median,
    paired_difference,
    paired_mean,
    ratio_of_medians,
)


@pytest.mark.parametrize("total", [1, 10, 359, 10_000])
def test_no_discordant_pair(total: int) -> None:
    """Tango's interval is then ±z²/(n + z²): narrower with more images, and never empty."""
    interval = paired_difference(0, 0, total)
    assert interval.value == 0
    assert interval.high == pytest.approx(Z_95**2 / (total + Z_95**2), rel=1e-9)
    assert interval.low == pytest.approx(-interval.high, rel=1e-9)


def test_published_example() -> None:
    """Complete response before and after consolidation (Cavo et al. 2012): of 161 patients, 6 and
    16 discordant. R's package contingencytables gives Tango's interval in its tests."""
    interval = paired_difference(6, 16, 161)
    found = (interval.low, interval.value, interval.high)
    assert found == pytest.approx((-0.1240, -0.0621, -0.0054), abs=5e-5)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 200))
def test_swapping_the_two_turns_the_interval_round(b: int, c: int, more: int) -> None:
    total = b + c + more
    there, back = paired_difference(b, c, total), paired_difference(c, b, total)
    assert (there.low, there.value, there.high) == pytest.approx(
        (-back.high, -back.value, -back.low), abs=1e-9
    )
    assert -1 <= there.low <= there.value <= there.high <= 1


@pytest.mark.parametrize(("b", "c", "n"), [(3, 1, 40), (0, 4, 359), (12, 12, 50), (5, 0, 5)])
def test_the_bounds_solve_the_score_equation(b: int, c: int, n: int) -> None:
    """At each bound, the statistic with the nuisance parameter that maximises the likelihood
    (found here on a grid, in the source by formula) is ±z."""
    interval = paired_difference(b, c, n)
    for delta, wanted in ((interval.low, Z_95), (interval.high, -Z_95)):
        if abs(delta) > 1 - 1e-6:
            continue  # the bound is the edge of what a difference can be
        second = np.linspace(max(0.0, -delta), (1 - delta) / 2, 400_001)[1:-1]
        first = second + delta
        with np.errstate(divide="ignore", invalid="ignore"):
            likelihood = (
                np.where(b > 0, b * np.log(first), 0.0)
                + np.where(c > 0, c * np.log(second), 0.0)
                + np.where(n > b + c, (n - b - c) * np.log(1 - first - second), 0.0)
            )
        best = second[np.nanargmax(likelihood)]
        statistic = (b - c - n * delta) / math.sqrt(n * (2 * best + delta - delta**2))
        assert statistic == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize(("first", "second"), [(0.005, 0.005), (0.01, 0.0), (0.1, 0.05)])
def test_the_interval_covers_what_it_says(first: float, second: float) -> None:
    """Of 2000 simulated test parts of 359 images, about 95 % have the true difference inside."""
    chance = np.random.default_rng(1)
    shares = [first, second, 1 - first - second]
    covered = 0
    for b, c, _ in chance.multinomial(359, shares, size=2000):
        interval = paired_difference(int(b), int(c), 359)
        covered += interval.low <= first - second <= interval.high
    assert 0.93 <= covered / 2000 <= 0.995


def test_ratio_of_equal_blocks_is_sharp() -> None:
    interval = ratio_of_medians([np.full(9, 3.0)] * 5, [np.full(9, 2.0)] * 5)
    assert (interval.low, interval.value, interval.high) == (1.5, 1.5, 1.5)


def test_ratio_is_repeatable() -> None:
    chance = np.random.default_rng(0)
    top, bottom = ([chance.exponential(size=30) for _ in range(6)] for _ in range(2))
    assert ratio_of_medians(top, bottom) == ratio_of_medians(top, bottom)


def test_a_disturbance_of_whole_blocks_widens_the_interval() -> None:
    """Runs of a block share their fate: 1000 of them in five disturbed blocks are no 1000 facts."""
    chance = np.random.default_rng(0)
    bottom = [np.full(200, 1.0)] * 6
    calm = [1.5 + chance.normal(0, 0.01, 200) for _ in range(6)]
    disturbed = [block + shift for block, shift in zip(calm, (0, 0, 0, 1, 1, 1), strict=True)]
    quiet, noisy = ratio_of_medians(calm, bottom), ratio_of_medians(disturbed, bottom)
    assert quiet.high - quiet.low < 0.01
    assert noisy.high - noisy.low > 0.9


def test_the_bootstrap_interval_covers_the_true_ratio() -> None:
    """Twenty blocks with a shift of their own each, true ratio 2."""
    chance = np.random.default_rng(3)
    covered = 0
    for seed in range(60):
        top = [2 + chance.normal(0, 0.1) + chance.normal(0, 0.05, 20) for _ in range(20)]
        bottom = [1 + chance.normal(0, 0.05) + chance.normal(0, 0.02, 20) for _ in range(20)]
        interval = ratio_of_medians(top, bottom, seed)
        covered += interval.low <= 2 <= interval.high
    assert covered >= 50


def test_a_difference_of_equal_blocks_is_sharp() -> None:
    interval = difference_of_medians([np.full(9, 3.0)] * 5, [np.full(9, 2.0)] * 5)
    assert (interval.low, interval.value, interval.high) == (1.0, 1.0, 1.0)


def test_the_bootstrap_interval_covers_the_true_difference_and_median() -> None:
    """True medians 2 and 1; what befalls both alike does not widen the difference."""
    chance = np.random.default_rng(5)
    covered = [0, 0]
    for seed in range(60):
        shared = chance.normal(0, 0.5, 20)
        top = [2 + shift + chance.normal(0, 0.05, 20) for shift in shared]
        bottom = [1 + shift + chance.normal(0, 0.05, 20) for shift in shared]
        both = difference_of_medians(top, bottom, seed), median(top, seed)
        covered[0] += both[0].low <= 1 <= both[0].high
        covered[1] += both[1].low <= 2 <= both[1].high
        assert both[0].high - both[0].low < both[1].high - both[1].low
    assert min(covered) >= 50


def test_the_interval_of_a_mean_covers_it() -> None:
    chance = np.random.default_rng(7)
    covered = 0
    for _ in range(400):
        interval = paired_mean(chance.exponential(size=100) - 1)
        covered += interval.low <= 0 <= interval.high
    assert covered >= 0.9 * 400


def test_one_sample_tells_no_spread() -> None:
    interval = paired_mean(np.array([0.25]))
    assert (interval.low, interval.value, interval.high) == (0.25, 0.25, 0.25)
