"""How alive the blocks are that were not removed: a pass over held-out images, no gate judging."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eps_train import graph
from eps_train.checkpoint import Checkpoint, GateRecord
from eps_train.deaths import watch_branches
from eps_train.errors import TrainingError
from eps_train.evaluate import BATCH, logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One branch on held-out images: largest `max |F_i|`, and each sample's own, float32 `[N]`."""

    peak: float
    per_sample: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Liveness:
    """One block whose gate is not latched.

    Attributes:
        block: its name.
        epsilon: the threshold it was last judged by, in units of the branch's output; 0: never.
        peak: largest `max |F_i|` on held-out images, in evaluation mode.
        quiet: share of samples whose own `max |F_i|` is at most epsilon (0..1).
        samples: images in that pass.
        closed: share of the last epoch's training steps on which the gate was closed (0..1); None
            when it was not judged then (epsilon 0 held it open).
    """

    block: str
    epsilon: float
    peak: float
    quiet: float
    samples: int
    closed: float | None

    @property
    def ratio(self) -> float | None:
        """`peak / epsilon`: at most 1 where no held-out image wakes the block; None without."""
        return self.peak / self.epsilon if self.epsilon else None


def liveness(
    checkpoint: Checkpoint, model: nn.Module, normalize: nn.Module, images: Tensor
) -> tuple[Liveness, ...]:
    """Measure the live gates of `model`, the checkpoint's gated network, in order of computation.

    Args:
        images: held-out images uint8 `[N, C, H, W]`, on any device.

    Raises:
        TrainingError: a response is not finite.
    """
    live = [record for record in checkpoint.gates if record.death is None]
    seen = responses(model, normalize, images, [record.block for record in live])
    return tuple(_liveness(checkpoint, record, seen[record.block]) for record in live)


def responses(
    model: nn.Module, normalize: nn.Module, images: Tensor, blocks: Iterable[str]
) -> dict[str, Response]:
    """What the named gated blocks' branches answer to `images`, in evaluation mode.

    There latched gates are shut and all others open: what is measured is the network that ships.
    """
    gates = graph.gates(model)
    watched = {block: gates[block] for block in blocks}
    if not watched:
        return {}
    device = next(iter(model.parameters())).device
    with watch_branches(watched, _sample_peaks) as peaks:
        for batch in images.split(BATCH):
            logits(model, normalize, batch.to(device))
    found = {block: torch.cat(pieces).cpu() for block, pieces in peaks.items()}
    for block, per_sample in found.items():
        if not bool(per_sample.isfinite().all()):
            raise TrainingError(
                f"block {block}: its response on held-out images is not finite; train again"
            )
    return {block: Response(peak=p.max().item(), per_sample=p) for block, p in found.items()}


def _liveness(checkpoint: Checkpoint, record: GateRecord, response: Response) -> Liveness:
    # A run may end with its live gates held open; they are then measured against its own epsilon.
    epsilon = record.epsilon or float(checkpoint.config.get("epsilon", 0.0))
    quiet = (response.per_sample <= epsilon).double().mean().item() if epsilon else 0.0
    judged = bool(record.epsilon and record.steps)
    return Liveness(
        block=record.block,
        epsilon=epsilon,
        peak=response.peak,
        quiet=quiet,
        samples=len(response.per_sample),
        closed=record.closed_steps / record.steps if judged else None,
    )


def _sample_peaks(branch: Tensor) -> Tensor:
    """Each sample's `max |F_i|`, float32 `[N]`."""
    return branch.float().abs().flatten(1).amax(dim=1)
