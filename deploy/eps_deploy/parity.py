"""The chain of proof: each stage computes what the stage before it computed, on real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eps_deploy.engines.base import Images, Logits

BATCHES = (1, 2, 7, 32)
_TINY = 1e-30  # all logits of the reference may be 0
SAMPLES = 64  # a multiple of all batches but 7, whose last batch is then a ragged one of 1

Infer = Callable[[Images], Logits]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far one stage's logits are from the stage's before, over all batches.

    Attributes:
        stage: which two are compared: `gated-compact`, `compact-onnx` or `baseline-onnx`.
        max_abs: largest difference of two logits; None if a logit was not finite.
        relative: `max_abs` over the largest magnitude among the reference's logits.
        limit: largest `relative` that passes; 0 demands equality.
        top1_agreement: share of images on which both name the same class, 0..1.
        worst_sample: index in the test part of the image with the largest difference.
        worst_batch: batch size at which that was.
        samples: images in each pass.
        batches: batch sizes of the passes.
    """

    stage: str
    max_abs: float | None
    relative: float | None
    limit: float
    top1_agreement: float
    worst_sample: int
    worst_batch: int
    samples: int
    batches: tuple[int, ...]

    @property
    def passed(self) -> bool:
        return self.relative is not None and self.relative <= self.limit


def pick_samples(total: int, count: int = SAMPLES) -> npt.NDArray[np.int64]:
    """`count` indices spread evenly over `total` images, with repetitions if there are fewer."""
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def compare(
    stage: str,
    reference: Infer,
    candidate: Infer,
    images: Images,
    indices: Sequence[int],
    limit: float,
) -> Parity:
    """Run `images` (uint8 `[N, C, H, W]`, known by `indices`) through both, at every batch size."""
    worst, worst_at, worst_batch = -1.0, 0, BATCHES[0]
    scale, agreeing, seen = 0.0, 0, 0
    for batch in BATCHES:
        for start, piece in _pieces(images, batch):
            expected, found = reference(piece), candidate(piece)
            difference = np.abs(expected.astype(np.float64) - found).max(axis=1)
            difference[~np.isfinite(difference)] = np.inf
            if difference.max() > worst:
                worst, worst_batch = float(difference.max()), batch
                worst_at = start + int(difference.argmax())
            scale = max(scale, float(np.abs(expected).max()))
            agreeing += int((expected.argmax(axis=1) == found.argmax(axis=1)).sum())
            seen += len(piece)
    finite = bool(np.isfinite(worst))
    return Parity(
        stage=stage,
        max_abs=worst if finite else None,
        relative=worst / max(scale, _TINY) if finite else None,
        limit=limit,
        top1_agreement=agreeing / seen,
        worst_sample=int(indices[worst_at]),
        worst_batch=worst_batch,
        samples=len(images),
        batches=BATCHES,
    )


def _pieces(images: Images, batch: int) -> Iterator[tuple[int, Images]]:
    for start in range(0, len(images), batch):
        yield start, images[start : start + batch]
