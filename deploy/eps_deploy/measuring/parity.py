"""The chain of proof: each stage computes what the stage before it computed, on real images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eps_deploy.engines.base import Images, Logits

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
