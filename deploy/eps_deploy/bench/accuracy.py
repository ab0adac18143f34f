"""Accuracy on the whole test part, and the drop against the baseline as a paired difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eps_core.stats import Interval, paired_difference
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


# -- How far from float32 each precision may be: what is normal for it, with room, and no more
#
# They are there to catch a mistake (a wrong scale, a saturated layer, swapped channels), whose
# logits are off by as much as they are large. Whether a precision is good enough is not said here,
# but by the accuracy on the whole test part.
#
# Measured against torch in float32: 5,000 test images of Fashion-MNIST on a compact network (depth
# 56, width 8, 11 blocks left) and its baseline of 27 blocks, 359 test images of digits on a
# compact network (depth 110, width 16, 18 blocks left) and its baseline of 54; int8 calibrated on
# 512 images, "minmax", with true Q/DQ arithmetic. The worst of the four:
#
# | precision | largest difference / largest logit | same class | |---|---|---| | fp32 | 4.3e-7 |
# 100 % | | fp16 (rounded to float16 between layers, computed in float32) | 1.1e-3 | 99.96 % | |
# bf16 (in torch) | 2.5e-2 | 99.74 % | | int8 | 6.4e-2 (1.3e-1 when calibrated on 100 images) |
# 99.26 % | | int8-fp16 | 6.5e-2 | 99.22 % |
#
# TF32 was not measured: it rounds operands to as many bits as float16 has, so it gets that limit.
# No torch here: servers check their engines too.

# Largest difference of two logits, over the largest magnitude among the reference's logits.
PARITY_LIMITS = {
    "fp32": 1e-4,
    "tf32": 5e-3,
    "fp16": 5e-3,
    "bf16": 0.1,
    "int8": 0.25,
    "int8-fp16": 0.25,
}
# Share of images of the same class, over a whole test part: on a few dozen images one that lies
# between two classes would decide.
AGREEMENT_LIMITS = {
    "fp32": 0.999,
    "tf32": 0.995,
    "fp16": 0.995,
    "bf16": 0.98,
    "int8": 0.95,
    "int8-fp16": 0.95,
}

# -- The chain of proof: each stage computes what the stage before it computed, on real images

_TINY = 1e-30  # all logits of the reference may be 0

Infer = Callable[[Images], Logits]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far one stage's logits are from the stage's before, over all batches.

    Attributes:
        stage: which two are compared: `gated-compact`, `compact-onnx`, `onnx-engine`,
            `baseline-onnx` or `baseline-engine`.
        max_abs: largest difference of two logits; None if a logit was not finite.
        relative: `max_abs` over the largest magnitude among the reference's logits.
        limit: largest `relative` that passes; 0 demands equality; None: told, not judged.
        top1_agreement: share of images on which both name the same class, 0..1.
        worst_sample: index in the test part of the image with the largest difference.
        worst_batch: batch size at which that was.
        samples: images in each pass.
        batches: batch sizes of the passes.
    """

    stage: str
    max_abs: float | None
    relative: float | None
    limit: float | None
    top1_agreement: float
    worst_sample: int
    worst_batch: int
    samples: int
    batches: tuple[int, ...]

    @property
    def passed(self) -> bool | None:
        if self.limit is None:
            return None
        return self.relative is not None and self.relative <= self.limit


def pick_samples(total: int, count: int) -> npt.NDArray[np.int64]:
    """`count` indices spread evenly over `total` images, with repetitions if there are fewer."""
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def passes(infer: Infer, images: Images, batches: Sequence[int]) -> list[Logits]:
    """The logits `[N, classes]` of all `images` (uint8 `[N, C, H, W]`), once a batch size."""
    return [
        np.concatenate([infer(images[at : at + batch]) for at in range(0, len(images), batch)])
        for batch in batches
    ]


def compare(
    stage: str,
    reference: Sequence[Logits],
    candidate: Sequence[Logits],
    indices: Sequence[int],
    limit: float | None,
    batches: Sequence[int],
) -> Parity:
    """Compare what :func:`passes` gave for two stages; `indices` are those of the images."""
    expected, found = np.stack(reference), np.stack(candidate)  # [batch size, image, class]
    difference = np.abs(expected.astype(np.float64) - found).max(axis=2)
    difference[~np.isfinite(difference)] = np.inf
    at_batch, at_image = np.unravel_index(difference.argmax(), difference.shape)
    worst = float(difference[at_batch, at_image])
    finite = np.isfinite(worst)
    scale = max(float(np.abs(expected).max()), _TINY)
    return Parity(
        stage=stage,
        max_abs=worst if finite else None,
        relative=worst / scale if finite else None,
        limit=limit,
        top1_agreement=float((expected.argmax(axis=2) == found.argmax(axis=2)).mean()),
        worst_sample=int(indices[int(at_image)]),
        worst_batch=batches[int(at_batch)],
        samples=len(indices),
        batches=tuple(batches),
    )
