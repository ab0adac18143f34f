"""The certificate: evidence that every removed block was dead, and proof that nothing changed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eps_compact.liveness import Liveness
from eps_train.checkpoint import Checkpoint
from eps_train.errors import EpsError
from eps_train.evaluate import logits

BATCHES = (1, 2, 7, 32)  # kernels are chosen by batch size, so each is compared with itself
ROUNDS = 4  # batches of each size and each kind of input
SEED = 0  # of the random images
_SLACK = 1e-6  # relative; epsilon is a float32 number on the gate


class ProofError(EpsError):
    """The compact network is not the gated one, or a removed block is not on record as dead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """One comparison of logits, float32, the compact network's with the gated one's.

    Attributes:
        inputs: what they were shown: `held-out images` or `random uint8 images`.
        batch: images in each call.
        images: images in all calls.
        equal: whether all logits are equal (`torch.equal`).
        max_abs: largest absolute difference.
    """

    inputs: str
    batch: int
    images: int
    equal: bool
    max_abs: float


def prove(
    gated: nn.Module, plain: nn.Module, normalize: nn.Module, heldout: Tensor
) -> tuple[Proof, ...]:
    """Show that `plain` computes what `gated` does in evaluation mode, to the last bit.

    Both lie on one device. Compared are logits on `heldout` (uint8 `[N, C, H, W]`, N >= 1) and on
    random images, at every batch size of `BATCHES`.

    Raises:
        ProofError: some logits differ, or are not finite; names the inputs, the batch size, and the
            largest difference.
    """
    return tuple(
        _compare(gated, plain, normalize, inputs, images)
        for size in BATCHES
        for inputs, images in _inputs(heldout, size)
    )


def check_evidence(checkpoint: Checkpoint) -> None:
    """Raise ProofError when a dead block's record does not say that it was silent."""
    for record in checkpoint.gates:
        death = record.death
        if death is None:
            continue
        limit = death.epsilon * (1 + _SLACK)
        silent = death.peak <= limit and death.heldout_peak <= limit
        if not (silent and death.steps > 0 and death.samples > 0):
            raise ProofError(
                f"block {record.block}: its record does not show it dead (peak {death.peak:g} in"
                f" {death.steps} steps, {death.heldout_peak:g} on {death.samples} held-out images,"
                f" epsilon {death.epsilon:g}); train again"
            )


def certificate(
    checkpoint: Checkpoint,
    *,
    proofs: tuple[Proof, ...],
    live: tuple[Liveness, ...],
    counts: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """The certificate as plain data.

    Keys: `removed` (per removed block its name and its death's evidence), `proof`, `live` (per live
    gate what `Liveness` holds, and `ratio`), `counts` (`blocks`, `parameters`, `flops`, each with
    `before` and `after`), `data`, `checkpoint` (digest), `versions` (those of the training).
    """
    data = checkpoint.data
    return {
        "removed": [
            {"block": record.block, **asdict(record.death)}
            for record in checkpoint.gates
            if record.death is not None
        ],
        "proof": [asdict(proof) for proof in proofs],
        "live": [{**asdict(block), "ratio": block.ratio} for block in live],
        "counts": counts,
        "data": {
            "name": data.name,
            "sha256": data.sha256,
            "split_seed": data.split_seed,
            "sizes": dict(data.sizes),
        },
        "checkpoint": checkpoint.digest,
        "versions": dict(checkpoint.versions),
    }


def _inputs(heldout: Tensor, size: int) -> Iterator[tuple[str, Tensor]]:
    """Named images uint8 `[ROUNDS * size, C, H, W]`; held-out ones repeat when they are too few."""
    count = ROUNDS * size
    # Other sizes start elsewhere, so that together they see more of the images.
    yield "held-out images", heldout[torch.arange(size, size + count) % len(heldout)]
    generator = torch.Generator().manual_seed(SEED + size)
    noise = torch.randint(0, 256, (count, *heldout.shape[1:]), generator=generator)
    yield "random uint8 images", noise.to(torch.uint8).to(heldout.device)


def _compare(
    gated: nn.Module, plain: nn.Module, normalize: nn.Module, inputs: str, images: Tensor
) -> Proof:
    size = len(images) // ROUNDS
    equal, largest = True, 0.0
    for batch in images.split(size):
        expected, found = logits(gated, normalize, batch), logits(plain, normalize, batch)
        equal = equal and torch.equal(expected, found)
        difference = (expected - found).abs().max().item()
        # max() would drop a NaN that comes second.
        largest = difference if math.isnan(difference) else max(largest, difference)
    if not equal:
        amount = "logits that are not finite" if math.isnan(largest) else f"by up to {largest:g}"
        raise ProofError(
            f"the compact network differs from the gated one on {inputs} at batch {size}"
            f" ({amount}); train again, or report this as a bug"
        )
    return Proof(inputs=inputs, batch=size, images=len(images), equal=equal, max_abs=largest)
