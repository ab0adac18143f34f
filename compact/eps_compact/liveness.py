"""How alive the blocks are that did not die: a pass over held-out images, no gate judging."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eps_train import graph
from eps_train.checkpoint import Checkpoint, GateRecord
from eps_train.deaths import watch_branches
from eps_train.errors import TrainingError
from eps_train.evaluate import logits
from eps_train.images import Part


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One branch on held-out images: largest `max |F_i|`, and each sample's own, float32 `[N]`."""

    peak: float
    per_sample: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """A pass over images: logits float32 `[N, classes]`, and the watched blocks' responses."""

    answers: Tensor
    responses: dict[str, Response]


@dataclass(frozen=True, kw_only=True, slots=True)
class Liveness:
    """One block whose gate is not latched.

    Attributes:
        block: its name.
        epsilon: the threshold it was last judged by, in units of the branch's output; 0: never.
        peak: largest `max |F_i|` on held-out images, in evaluation mode; None: none were looked at.
        quiet: share of samples whose own `max |F_i|` is at most epsilon (0..1): those on which a
            plain addition differs from a gate that judges each sample by itself.
        samples: images in that pass.
        closed: share of the last epoch's training steps on which the gate was closed (0..1); None
            when it was not judged then (epsilon 0 held it open).
    """

    block: str
    epsilon: float
    peak: float | None
    quiet: float | None
    samples: int
    closed: float | None

    @property
    def ratio(self) -> float | None:
        """`peak / epsilon`: at most 1 where no held-out image wakes the block; None without."""
        return self.peak / self.epsilon if self.epsilon and self.peak is not None else None


def live_blocks(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the blocks whose gates are not latched, in the order of computation."""
    return tuple(record.block for record in checkpoint.gates if record.death is None)


def liveness(
    checkpoint: Checkpoint, responses: Mapping[str, Response] | None
) -> tuple[Liveness, ...]:
    """The live gates of a checkpoint, in order of computation.

    Args:
        responses: what :func:`observe` saw of `live_blocks`; None: the training record alone.
    """
    return tuple(
        _liveness(checkpoint, record, None if responses is None else responses[record.block])
        for record in checkpoint.gates
        if record.death is None
    )


def observe(
    model: nn.Module, normalize: nn.Module, images: Tensor | Part, blocks: Iterable[str]
) -> Observation:
    """Answers of `model` in evaluation mode, and what the named gated blocks' branches said.

    There latched gates are shut and all others open: what is measured is the network that ships.

    Args:
        images: uint8 `[N, C, H, W]`, or a part of a data set that is read as it goes.

    Raises:
        TrainingError: a response is not finite.
    """
    gates = graph.gates(model)
    watched = {block: gates[block] for block in blocks}
    device = next(iter(model.parameters())).device
    with watch_branches(watched, _sample_peaks) as peaks:
        answers = logits(model, normalize, images.to(device))
    found = {block: torch.cat(pieces).cpu() for block, pieces in peaks.items()}
    for block, per_sample in found.items():
        if not bool(per_sample.isfinite().all()):
            raise TrainingError(
                f"block {block}: its response on held-out images is not finite; train again"
            )
    return Observation(
        answers=answers.cpu(),
        responses={
            block: Response(peak=p.max().item(), per_sample=p) for block, p in found.items()
        },
    )


def _liveness(checkpoint: Checkpoint, record: GateRecord, response: Response | None) -> Liveness:
    # A run may end with its live gates held open; they are then measured against its own epsilon.
    epsilon = record.epsilon or float(checkpoint.config.get("epsilon") or 0.0)
    quiet = None
    if response is not None:
        quiet = (response.per_sample <= epsilon).double().mean().item() if epsilon else 0.0
    return Liveness(
        block=record.block,
        epsilon=epsilon,
        peak=None if response is None else response.peak,
        quiet=quiet,
        samples=0 if response is None else len(response.per_sample),
        closed=closed_share(record),
    )


def closed_share(record: GateRecord) -> float | None:
    """Share of the last epoch's steps on which a gate was closed; None if it was not judged."""
    return record.closed_steps / record.steps if record.epsilon and record.steps else None


def _sample_peaks(branch: Tensor) -> Tensor:
    """Each sample's `max |F_i|`, float32 `[N]`."""
    return branch.float().abs().flatten(1).amax(dim=1)
