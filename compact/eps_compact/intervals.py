"""Intervals for what is claimed: a drop in accuracy or a rise in loss, and what medians tell.

No torch, no scipy: each is a few lines of numpy, and tests hold them to references.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def paired_difference(only_first: int, only_second: int, total: int) -> Interval:
    """Difference of two success rates measured on the same `total` samples, each in 0..1.

    Only the discordant pairs count: `only_first` samples that the first got right and the second
    got wrong, and `only_second` the other way round. The value is `(only_first - only_second) /
    total`; the interval is Tango's score interval (Statistics in Medicine 17:891-908, 1998), which
    keeps its coverage with few or no discordant pairs: with none it is ±z²/(total + z²).
    """
    assert total > 0
    assert min(only_first, only_second) >= 0
    assert only_first + only_second <= total
    value = (only_first - only_second) / total

    def bound(z: float) -> float:
        # The statistic falls from +inf to -inf as delta runs from -1 to 1: bisection finds z.
        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            if _tango_statistic(middle, only_first, only_second, total) > z:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    return Interval(value, min(value, bound(Z_95)), max(value, bound(-Z_95)))


def _tango_statistic(delta: float, b: int, c: int, n: int) -> float:
    """Score statistic of the hypothesis that the difference is `delta`."""
    linear = -b - c + (2 * n - b + c) * delta
    constant = -c * delta * (1 - delta)
    # Maximum likelihood of P(second only) if the difference were delta.
    root = math.sqrt(max(0.0, linear * linear - 8 * n * constant))
    second_only = (root - linear) / (4 * n)
    variance = n * (2 * second_only + delta * (1 - delta))
    distance = b - c - n * delta
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def paired_mean(differences: npt.NDArray[np.float64]) -> Interval:
    """Mean of differences measured on the same samples, `[N]`, by the normal approximation.

    With a single sample nothing is known of their spread: the interval is then the value alone.
    """
    assert len(differences) > 0
    value = float(differences.mean())
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    reach = Z_95 * spread / math.sqrt(len(differences))
    return Interval(value, value - reach, value + reach)


def ratio_of_medians(
    numerator: Sequence[npt.NDArray[np.float64]],
    denominator: Sequence[npt.NDArray[np.float64]],
    seed: int = 0,
) -> Interval:
    """Median of all `numerator` runs over median of all `denominator` runs, with its interval.

    Both are lists of blocks, block i of one measured right beside block i of the other. Runs within
    a block share whatever the machine was doing then, so the percentile bootstrap resamples pairs
    of blocks, not runs. Blocks of one side have equal lengths. One seed, one interval.
    """
    medians = _resampled_medians(numerator, denominator, seed)
    value = np.median(np.stack(numerator)) / np.median(np.stack(denominator))
    return _percentiles(float(value), medians[0] / medians[1])


def difference_of_medians(
    first: Sequence[npt.NDArray[np.float64]],
    second: Sequence[npt.NDArray[np.float64]],
    seed: int = 0,
) -> Interval:
    """Median of all `first` runs less that of all `second`, as :func:`ratio_of_medians` does it."""
    medians = _resampled_medians(first, second, seed)
    value = np.median(np.stack(first)) - np.median(np.stack(second))
    return _percentiles(float(value), medians[0] - medians[1])


def median(blocks: Sequence[npt.NDArray[np.float64]], seed: int = 0) -> Interval:
    """Median of all runs, with its interval by the same bootstrap over blocks."""
    medians = _resampled_medians(blocks, blocks, seed)
    return _percentiles(float(np.median(np.stack(blocks))), medians[0])


def _resampled_medians(
    first: Sequence[npt.NDArray[np.float64]],
    second: Sequence[npt.NDArray[np.float64]],
    seed: int,
) -> list[npt.NDArray[np.float64]]:
    """Both sides' medians over pairs of blocks drawn anew, `[RESAMPLES]` each."""
    assert len(first) == len(second) > 0
    sides = np.stack(first), np.stack(second)
    picks = np.random.default_rng(seed).integers(len(first), size=(RESAMPLES, len(first)))
    return [np.median(side[picks].reshape(RESAMPLES, -1), axis=1) for side in sides]


def _percentiles(value: float, resampled: npt.NDArray[np.float64]) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))
