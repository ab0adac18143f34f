"""95 % confidence intervals: paired differences, means, medians and ratios of medians.

Needs numpy only, neither torch nor scipy; tests compare each function with a reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
_TAIL = 0.025  # of a two-sided 95 % interval

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Of a ratio, as `2.12 (1.63 to 2.56)`."""
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def paired_difference(
    only_first: int, only_second: int, total: int, *, together: int = 1
) -> Interval:
    """Difference of two success rates measured on the same `total` samples, each in 0..1.

    Only the discordant pairs count: `only_first` samples that the first got right and the second
    got wrong, and `only_second` the other way round. The value is `(only_first - only_second) /
    total`; the interval is Tango's score interval (Statistics in Medicine 17:891-908, 1998), which
    keeps its coverage with few or no discordant pairs: with none it is ±z²/(total + z²).

    With `together` intervals, all of them hold at once with 95 % (Bonferroni).
    """
    assert total > 0
    assert min(only_first, only_second) >= 0
    assert only_first + only_second <= total
    value = (only_first - only_second) / total
    z = Z_95 if together == 1 else NormalDist().inv_cdf(1 - _TAIL / together)
    low = _tango_bound(only_first, only_second, total, z)
    high = _tango_bound(only_first, only_second, total, -z)
    return Interval(value, min(value, low), max(value, high))


def paired_counts(
    first: npt.NDArray[np.bool_],
    second: npt.NDArray[np.bool_],
    groups: npt.NDArray[np.int64],
    count: int,
) -> list[tuple[int, int, int]]:
    """Arguments of :func:`paired_difference` for each of `count` groups of samples.

    Args:
        first, second: which of the same samples each got right, `[N]`.
        groups: group of each sample, 0 to `count` - 1, `[N]`.
    """
    masks = (first & ~second, second & ~first, np.ones(len(groups), dtype=bool))
    columns = [np.bincount(groups[mask], minlength=count).tolist() for mask in masks]
    return list(zip(*columns, strict=True))


@lru_cache(maxsize=10_000)  # many classes share few combinations of counts
def _tango_bound(b: int, c: int, n: int, z: float) -> float:
    """The difference at which the statistic is `z`."""
    # The statistic falls from +inf to -inf as delta runs from -1 to 1: bisection finds z.
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _tango_statistic(middle, b, c, n) > z:
            low = middle
        else:
            high = middle
    return (low + high) / 2


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


def paired_mean(differences: Floats) -> Interval:
    """Mean of differences measured on the same samples, `[N]`, by the normal approximation.

    The interval of a single sample is its value alone.
    """
    assert len(differences) > 0
    value = float(differences.mean())
    std = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    reach = Z_95 * std / math.sqrt(len(differences))
    return Interval(value, value - reach, value + reach)


# Times are measured in blocks, `[blocks, runs]` or one array a block; see `eps_core.timing`. Runs
# within a block share whatever the machine was doing then, and so do blocks of two calls that were
# measured side by side. What counts as independent is therefore one number a block, its median, or
# one ratio for each pair of blocks.


def median(blocks: Iterable[Floats]) -> Interval:
    """Median of the blocks' medians."""
    return _median_interval(_medians(blocks))


def ratio_of_medians(numerator: Iterable[Floats], denominator: Iterable[Floats]) -> Interval:
    """Median over pairs of blocks of the ratio of their medians."""
    return _median_interval(_medians(numerator) / _medians(denominator))


def _medians(blocks: Iterable[Floats]) -> Floats:
    return np.array([np.median(block) for block in blocks])


def _median_interval(values: Floats) -> Interval:
    """Median of `[N]` independent values, with order statistics as its 95 % interval.

    Each value is below the true median as often as above it, whatever the distribution: the number
    below is binomial, which gives the order statistics that bound the median (Conover, Practical
    Nonparametric Statistics, 3.2). Fewer than six values have no such interval; the lowest and the
    highest stand for it (of five values they hold 94 %).
    """
    ordered = np.sort(values)
    count = len(ordered)
    assert count > 0
    outside = 0  # values that may be left out at each end
    tail = 0.5**count  # probability of at most so many on one side
    while tail <= _TAIL:
        outside += 1
        tail += math.comb(count, outside) * 0.5**count
    edge = max(outside - 1, 0)
    return Interval(float(np.median(ordered)), float(ordered[edge]), float(ordered[-1 - edge]))
