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
_TAIL = 0.025  # of a two-sided 95 % interval


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
    numerator: Sequence[npt.NDArray[np.float64]], denominator: Sequence[npt.NDArray[np.float64]]
) -> Interval:
    """How many times as long the runs of `numerator` took as those of `denominator`.

    Both are lists of blocks, block i of one measured right beside block i of the other. Runs within
    a block share whatever the machine was doing then, and so do the two blocks of a pair; what
    counts is therefore one ratio for each pair, of the medians of its blocks. See
    :func:`typical` for what becomes of them.
    """
    return typical(_medians(numerator) / _medians(denominator))


def difference_of_medians(
    first: Sequence[npt.NDArray[np.float64]], second: Sequence[npt.NDArray[np.float64]]
) -> Interval:
    """By how much longer the runs of `first` took, as :func:`ratio_of_medians` does it."""
    return typical(_medians(first) - _medians(second))


def median(blocks: Sequence[npt.NDArray[np.float64]]) -> Interval:
    """The median of the blocks' medians, with the interval of :func:`typical`."""
    return typical(_medians(blocks))


def typical(values: npt.NDArray[np.float64]) -> Interval:
    """Median of `[N]` independent values, between the two of them that make its 95 % interval.

    Each value lies below the true median as often as above it, whatever the distribution is: how
    many do is binomial, which gives the order statistics that bound it (Conover, Practical
    Nonparametric Statistics, 3.2). With fewer than six values these would be further out than the
    lowest and the highest, which are given then: of five, they hold 94 %.
    """
    ordered = np.sort(values)
    count = len(ordered)
    assert count > 0
    outside = 0  # values that may be left out at each end
    tail = 0.5**count  # the chance of at most so many on one side
    while tail <= _TAIL:
        outside += 1
        tail += math.comb(count, outside) * 0.5**count
    edge = max(outside - 1, 0)
    return Interval(float(np.median(ordered)), float(ordered[edge]), float(ordered[-1 - edge]))


def _medians(blocks: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    return np.array([np.median(block) for block in blocks])
