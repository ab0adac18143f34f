"""Confidence intervals against closed forms, a brute-force likelihood, publications, simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eps_core.stats import (
    Z_95,
    Interval,
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
def test_swapping_the_two_mirrors_the_interval(b: int, c: int, more: int) -> None:
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
def test_the_interval_has_its_nominal_coverage(first: float, second: float) -> None:
    """Of 2000 simulated test parts of 359 images, about 95 % have the true difference inside."""
    rng = np.random.default_rng(1)
    shares = [first, second, 1 - first - second]
    covered = 0
    for b, c, _ in rng.multinomial(359, shares, size=2000):
        interval = paired_difference(int(b), int(c), 359)
        covered += interval.low <= first - second <= interval.high
    assert 0.93 <= covered / 2000 <= 0.995


def test_ratio_of_equal_blocks_is_sharp() -> None:
    interval = ratio_of_medians([np.full(9, 3.0)] * 6, [np.full(9, 2.0)] * 6)
    assert (interval.low, interval.value, interval.high) == (1.5, 1.5, 1.5)


def test_a_disturbance_of_whole_blocks_widens_the_interval() -> None:
    """Runs of one block are not independent: a thousand of them count as one observation."""
    rng = np.random.default_rng(0)
    bottom = [np.full(200, 1.0)] * 6
    calm = [1.5 + rng.normal(0, 0.01, 200) for _ in range(6)]
    disturbed = [block + shift for block, shift in zip(calm, (0, 0, 0, 1, 1, 1), strict=True)]
    quiet, noisy = ratio_of_medians(calm, bottom), ratio_of_medians(disturbed, bottom)
    assert quiet.high - quiet.low < 0.01
    assert noisy.high - noisy.low > 0.9


def test_a_disturbance_of_both_blocks_of_a_pair_cancels() -> None:
    """The machine is three times as slow at times; the ratio is still 2."""
    rng = np.random.default_rng(4)
    speeds = rng.choice([1.0, 3.0], 50)
    bottom = [speed * (1 + rng.normal(0, 0.01, 9)) for speed in speeds]
    top = [2 * speed * (1 + rng.normal(0, 0.01, 9)) for speed in speeds]
    interval = ratio_of_medians(top, bottom)
    assert 1.99 < interval.low <= 2 <= interval.high < 2.01


@pytest.mark.parametrize("blocks", [6, 7, 12, 20, 33, 100])
def test_the_interval_covers_the_true_ratio_and_median(blocks: int) -> None:
    """True medians 2 and 1, each block with a shift of its own: in 95 of 100, and hardly more."""
    rng = np.random.default_rng(blocks)
    covered = np.zeros(2)
    for _ in range(400):
        top = [2 + rng.normal(0, 0.1) + rng.normal(0, 0.05, 5) for _ in range(blocks)]
        bottom = [1 + rng.normal(0, 0.001, 5) for _ in range(blocks)]
        found = ratio_of_medians(top, bottom), median(top)
        covered += [
            interval.low <= true <= interval.high
            for interval, true in zip(found, (2, 2), strict=True)
        ]
    assert (covered / 400 >= 0.93).all()
    assert (covered / 400 <= 0.995).all()


def test_few_blocks_make_an_interval_of_all_of_them() -> None:
    values = [np.array([float(value)]) for value in (5, 1, 4, 2, 3)]
    interval = median(values)
    assert (interval.low, interval.value, interval.high) == (1, 3, 5)
    assert median(values[:1]) == Interval(5, 5, 5)


def test_many_blocks_leave_the_outer_ones_out() -> None:
    """Of twenty, five at each end: 1 - 2 P(B(20, 1/2) <= 5) is 0.959."""
    values = [np.array([float(value)]) for value in range(1, 21)]
    assert median(values) == Interval(10.5, 6, 15)


def test_the_interval_of_a_mean_covers_it() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(400):
        interval = paired_mean(rng.exponential(size=100) - 1)
        covered += interval.low <= 0 <= interval.high
    assert covered >= 0.9 * 400


def test_the_interval_of_one_sample_is_its_value() -> None:
    interval = paired_mean(np.array([0.25]))
    assert (interval.low, interval.value, interval.high) == (0.25, 0.25, 0.25)
