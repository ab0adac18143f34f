"""Checks with a value, a limit and an outcome; parity of two networks' logits. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

_TINY = 1e-30  # all logits of the reference may be 0


@dataclass(frozen=True, slots=True)
class Check:
    """One check and its outcome.

    Attributes:
        name: what was checked, as in `parity-compact-onnx`.
        passed: None: it was not, or could not be, checked.
        detail: what was found, or why nothing was; one line.
        value: what was measured; None when it was no finite number, or nothing was measured.
        limit: what `value` is compared with.
        conclusive: False when there is too little data to be sure of `passed`.
    """

    name: str
    passed: bool | None
    detail: str
    _: KW_ONLY
    value: float | None = None
    limit: float | None = None
    conclusive: bool = True


@dataclass(slots=True)
class Verification:
    """All checks of one file; `lossless` is what its certificate says."""

    lossless: bool
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """Difference between two networks' logits on the same images, over all batch sizes.

    Attributes:
        stage: which two are compared: `rewriting` or `folding` in a certificate; `gated-compact`,
            `compact-onnx`, `onnx-engine`, `baseline-onnx` or `baseline-engine` in a report.
        max_abs: largest absolute difference of two logits; None if one was not finite.
        relative: `max_abs` over the largest magnitude among the reference's logits.
        limit: largest `relative` that passes; 0 demands equality; None: reported, not checked.
        top1_agreement: fraction of images on which both predict the same class, 0..1.
        worst_sample: index of the image with the largest difference.
        worst_batch: batch size at which that was.
        samples: images for each batch size.
        batches: batch sizes.
        inputs: what the images are.
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
    inputs: str = "test images"

    @property
    def passed(self) -> bool | None:
        if self.limit is None:
            return None
        return self.relative is not None and self.relative <= self.limit


def compare_logits(
    stage: str,
    reference: Sequence[npt.NDArray[Any]],
    candidate: Sequence[npt.NDArray[Any]],
    *,
    batches: Sequence[int],
    limit: float | None,
    indices: Sequence[int] | None = None,
    inputs: str = "test images",
) -> Parity:
    """Compare the logits of two networks.

    Args:
        stage, batches, limit, inputs: as in :class:`Parity`.
        reference, candidate: logits `[N, classes]`, one array for each of `batches`.
        indices: of the N images, for `worst_sample`; 0 to N - 1 by default.
    """
    expected, found = np.stack(reference), np.stack(candidate)  # [batch size, image, class]
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        difference = np.abs(expected.astype(np.float64) - found).max(axis=2)
    difference[~np.isfinite(difference)] = np.inf
    at_batch, at_image = np.unravel_index(difference.argmax(), difference.shape)
    worst = float(difference[at_batch, at_image])
    finite = np.isfinite(worst)
    return Parity(
        stage=stage,
        max_abs=worst if finite else None,
        relative=worst / max(float(np.abs(expected).max()), _TINY) if finite else None,
        limit=limit,
        top1_agreement=float((expected.argmax(axis=2) == found.argmax(axis=2)).mean()),
        worst_sample=int(at_image if indices is None else indices[int(at_image)]),
        worst_batch=batches[int(at_batch)],
        samples=expected.shape[1],
        batches=tuple(batches),
        inputs=inputs,
    )
