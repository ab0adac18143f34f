"""Accuracy on the whole test part, and the drop against the baseline as a paired difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eps_compact.intervals import Interval, paired_difference
from eps_deploy.engines.base import Images, Logits

METHOD = "paired difference, 95 % score interval (Tango 1998)"

Classes = npt.NDArray[np.int64]
Correct = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """What deployment costs in accuracy, in percentage points; positive: the baseline is better.

    Attributes:
        points: the drop with its 95 % interval.
        only_baseline: images that only the baseline got right.
        only_engine: images that only the engine got right.
        samples: images of the test part.
        limit: largest drop that passes.
    """

    points: Interval
    only_baseline: int
    only_engine: int
    samples: int
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the measured drop is within the limit."""
        # Rounding must not fail a drop of exactly the limit, such as 1 image of 200 at 0.5 points.
        return self.points.value <= self.limit + 1e-9

    @property
    def conclusive(self) -> bool:
        """Whether there are enough images: the whole interval lies on one side of the limit."""
        return self.points.high <= self.limit or self.points.low > self.limit


def classes(infer: Callable[[Images], Logits], images: Images, batch: int) -> Classes:
    """The class that `infer` gives each image (uint8 `[N, C, H, W]`): int64 `[N]`.

    -1 where a logit is not finite: no class is named, and none can be right.
    """
    starts = range(0, len(images), batch)
    logits = np.concatenate([infer(images[at : at + batch]) for at in starts])
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)


def accuracy_drop(baseline: Correct, engine: Correct, limit: float) -> Drop:
    """Compare two networks image by image; `limit` in percentage points."""
    only_baseline = int((baseline & ~engine).sum())
    only_engine = int((engine & ~baseline).sum())
    share = paired_difference(only_baseline, only_engine, len(baseline))
    return Drop(
        points=Interval(100 * share.value, 100 * share.low, 100 * share.high),
        only_baseline=only_baseline,
        only_engine=only_engine,
        samples=len(baseline),
        limit=limit,
    )
