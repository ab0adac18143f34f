"""Predictions over all test images, and the limits of the logits and of their agreement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eps_deploy.engines.base import Images, Logits, finite_rows

# Limits per precision. They catch mistakes such as a wrong scale, a saturated layer or swapped
# channels, whose logits are off by as much as they are large. Whether a precision is good enough is
# judged by the accuracy on all test images, not by these.
#
# Measured against torch in float32: 5,000 test images of Fashion-MNIST on a compact network (depth
# 56, width 8, 11 blocks left) and its baseline of 27 blocks, 359 test images of digits on a compact
# network (depth 110, width 16, 18 blocks left) and its baseline of 54; int8 calibrated on 512
# images, "minmax", with exact Q/DQ arithmetic. The worst of the four:
#
# | precision | largest difference / largest logit | same class |
# |---|---|---|
# | fp32 | 4.3e-7 | 100 % |
# | fp16 (rounded to float16 between layers, computed in float32) | 1.1e-3 | 99.96 % |
# | bf16 (in torch) | 2.5e-2 | 99.74 % |
# | int8 | 6.4e-2 (1.3e-1 when calibrated on 100 images) | 99.26 % |
# | int8-fp16 | 6.5e-2 | 99.22 % |
#
# TF32 was not measured: it rounds operands to as many bits as float16 has, so it has that limit.

# Largest difference of two logits, over the largest magnitude among the reference's logits.
PARITY_LIMITS = {
    "fp32": 1e-4,
    "tf32": 5e-3,
    "fp16": 5e-3,
    "bf16": 0.1,
    "int8": 0.25,
    "int8-fp16": 0.25,
}
# Fraction of all test images with the same class: among a few dozen images, a single one that is
# between two classes would decide.
AGREEMENT_LIMITS = {
    "fp32": 0.999,
    "tf32": 0.995,
    "fp16": 0.995,
    "bf16": 0.98,
    "int8": 0.95,
    "int8-fp16": 0.95,
}

Classes = npt.NDArray[np.int64]
Correct = npt.NDArray[np.bool_]
Infer = Callable[[Images], Logits]


def passes(infer: Infer, images: Images, batches: Sequence[int]) -> list[Logits]:
    """Return the logits `[N, classes]` of `images` (uint8 `[N, C, H, W]`) for each batch size."""
    return [
        np.concatenate([infer(images[at : at + batch]) for at in range(0, len(images), batch)])
        for batch in batches
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What a network predicts for N labelled images.

    Attributes:
        classes: predicted class, int64 `[N]`; -1 where a logit is not finite: no class is
            predicted, and none can be correct.
        ranks: number of classes with a higher logit than the label's, int64 `[N]`; of equal logits
            the first counts as higher, as in the prediction. Where a logit is not finite, the
            number of classes.
        confidence: softmax probability of the predicted class, `[N]`; 0 where there is none.
    """

    classes: Classes
    ranks: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]

    @property
    def correct(self) -> Correct:
        return self.top(1)

    def top(self, count: int) -> Correct:
        """Whether the label is among the `count` highest logits."""
        found: Correct = self.ranks < count
        return found


def answers(infer: Infer, images: Images, labels: Classes, batch: int) -> Answers:
    """Run a network on labelled images, uint8 `[N, C, H, W]`, `batch` at a time."""
    found = [
        _answers(infer(images[at : at + batch]), labels[at : at + batch])
        for at in range(0, len(images), batch)
    ]
    classes, ranks, confidence = (np.concatenate(column) for column in zip(*found, strict=True))
    return Answers(classes=classes, ranks=ranks, confidence=confidence)


def _answers(
    logits: Logits, labels: Classes
) -> tuple[Classes, npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The fields of `Answers` for one batch."""
    known = finite_rows(logits)
    values = np.where(known[:, np.newaxis], logits, 0).astype(np.float64)
    own = np.take_along_axis(values, labels[:, np.newaxis], axis=1)
    first = np.arange(values.shape[1]) < labels[:, np.newaxis]
    ranks = ((values > own) | ((values == own) & first)).sum(axis=1)
    highest = values.max(axis=1, keepdims=True)
    confidence = 1 / np.exp(values - highest).sum(axis=1)
    return (
        np.where(known, values.argmax(axis=1), -1),
        np.where(known, ranks, values.shape[1]),
        np.where(known, confidence, 0.0),
    )
