"""How alive the blocks are that did not die: a pass over held-out images, no gate judging."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eps_core.errors import GraphError, TrainingError
from eps_train.data.images import Part
from eps_train.gating import rewriting
from eps_train.gating.pruning_state import watch_branches
from eps_train.training.checkpoint import Checkpoint, GateRecord
from eps_train.training.evaluate import logits


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
class BlockEvidence:
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
) -> tuple[BlockEvidence, ...]:
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
    gates = rewriting.gates(model)
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


def _liveness(
    checkpoint: Checkpoint, record: GateRecord, response: Response | None
) -> BlockEvidence:
    # A run may end with its live gates held open; they are then measured against its own epsilon.
    epsilon = record.epsilon or float(checkpoint.config.get("epsilon") or 0.0)
    quiet = None
    if response is not None:
        quiet = (response.per_sample <= epsilon).double().mean().item() if epsilon else 0.0
    return BlockEvidence(
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


# -- What it changes that a live gate ships as a plain addition
#
# In training a gate judges a whole batch, so that an answer depends on its neighbours; what is
# served must not. Compared is the plain addition with the same gate judging each image by itself.


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeGap:
    """Plain additions against gates that judge each image by itself, on held-out images.

    Attributes:
        blocks: those whose gates were closed on steps of the last epoch, in the order of
            computation.
        samples: images.
        differ: share of the images on which at least one gate shut (0..1).
        top1_differ: share of the images that are then named otherwise.
        accuracy: top-1 (0..1) of both, `addition` and `gate`; None where labels are not known.
    """

    blocks: tuple[str, ...]
    samples: int
    differ: float
    top1_differ: float
    accuracy: dict[str, float] | None


def flicker(
    model: nn.Module,
    normalize: nn.Module,
    images: Tensor | Part,
    thresholds: Mapping[str, float],
    answers: Tensor,
    labels: Tensor | None,
) -> ModeGap:
    """Run `model` with its live gates judging each image, and compare with `answers`.

    Args:
        model: the gated network, in evaluation mode; its own gates are left as they are.
        images: uint8 `[N, C, H, W]`, or a part of a data set.
        thresholds: epsilon of the gates that are to judge, by block; one or more.
        answers: float32 `[N, classes]`: what the network says with plain additions.
        labels: int64 `[N]`, or None.
    """
    judged, shut = _judged(model, normalize, images, thresholds)
    named, otherwise = answers.argmax(dim=1), judged.argmax(dim=1)
    return ModeGap(
        blocks=tuple(shut),
        samples=len(answers),
        differ=_share(torch.stack(list(shut.values())).any(dim=0)),
        top1_differ=_share(named != otherwise),
        accuracy=None
        if labels is None
        else {"addition": _share(named == labels), "gate": _share(otherwise == labels)},
    )


def _judged(
    model: nn.Module,
    normalize: nn.Module,
    images: Tensor | Part,
    thresholds: Mapping[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits with gates that judge each image, and by block which images bool `[N]` it shut on."""
    gates = rewriting.gates(model)
    found: dict[str, list[Tensor]] = {block: [] for block in thresholds}

    def judge(block: str, epsilon: float) -> Any:
        def hook(gate: nn.Module, operands: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
            shortcut, branch = operands
            shut = branch.float().abs().flatten(1).amax(dim=1) <= epsilon
            found[block].append(shut)
            return torch.where(shut.view(-1, *[1] * (branch.dim() - 1)), shortcut, output)

        return hook

    handles = [
        gates[block].register_forward_hook(judge(block, epsilon))
        for block, epsilon in thresholds.items()
    ]
    try:
        device = next(iter(model.parameters())).device
        answers = logits(model, normalize, images.to(device)).cpu()
    finally:
        for handle in handles:
            handle.remove()
    order = [block for block in gates if block in found]
    return answers, {block: torch.cat(found[block]).cpu() for block in order}


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()


# -- What held-out images say about a checkpoint's blocks: liveness, flicker, what a removal
#    costs


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """The evidence of a compaction, besides the deaths.

    Attributes:
        images: held-out images that were looked at; 0: the training record is all there is.
        beyond: blocks that were removed although they did not die: what is left is not lossless.
        live: every block that did not die, those of `beyond` too.
        flicker: what plain additions change for the blocks that stay and whose gates were closed on
            steps of the last epoch; None without such blocks, or without images.
        accuracy: where `beyond` is not empty: top-1 (0..1) on the held-out images `before` and
            `after` its removal, and `samples`; None where that was not measured.
    """

    images: int
    beyond: tuple[str, ...]
    live: tuple[BlockEvidence, ...]
    flicker: ModeGap | None
    accuracy: dict[str, float] | None


def blocks_beyond(
    checkpoint: Checkpoint, closed_at_least: float, also: Iterable[str] = ()
) -> tuple[str, ...]:
    """Blocks to take out that did not die, in the order of computation.

    Those whose gate was closed on that share of the last epoch's steps, as in the authors' table of
    thresholds (paper, section 5), and those of `also`. At 1 the latched deaths alone count.

    Raises GraphError when `also` names a block that has no gate.
    """
    named = set(also)
    if unknown := sorted(named - {record.block for record in checkpoint.gates}):
        raise GraphError(f"no gated block named {', '.join(unknown)}")
    found = []
    for record in checkpoint.gates:
        share = closed_share(record)
        enough = closed_at_least < 1 and share is not None and share >= closed_at_least
        if record.death is None and (enough or record.block in named):
            found.append(record.block)
    return tuple(found)


def look(
    checkpoint: Checkpoint,
    gated: nn.Module,
    shut: nn.Module,
    normalize: nn.Module,
    heldout: Tensor | Part | None,
    beyond: tuple[str, ...] = (),
) -> Findings:
    """Measure every block that did not die.

    Args:
        gated: the checkpoint's network with its dead gates latched.
        shut: the same with the gates of `beyond` latched too.
        heldout: images uint8 `[N, C, H, W]`, or a part of a data set, whose labels are then used;
            None: nothing is measured.
        beyond: blocks that go although they did not die.

    Raises:
        TrainingError: a response is not finite.
    """
    if heldout is None:
        return Findings(
            images=0,
            beyond=beyond,
            live=liveness(checkpoint, None),
            flicker=None,
            accuracy=None,
        )
    labels = None if isinstance(heldout, Tensor) else heldout.labels.cpu()
    before = observe(gated, normalize, heldout, live_blocks(checkpoint))
    live = liveness(checkpoint, before.responses)
    answers = logits(shut, normalize, heldout) if beyond else before.answers
    accuracy = None
    if beyond and labels is not None:
        accuracy = {
            "before": _accuracy(before.answers, labels),
            "after": _accuracy(answers, labels),
            "samples": len(labels),
        }
    # A gate that no training batch shut any more never judged anything that could be missed.
    thresholds = {
        block.block: block.epsilon for block in live if block.closed and block.block not in beyond
    }
    return Findings(
        images=len(heldout),
        beyond=beyond,
        live=live,
        flicker=flicker(shut, normalize, heldout, thresholds, answers, labels)
        if thresholds
        else None,
        accuracy=accuracy,
    )


def _accuracy(answers: Tensor, labels: Tensor) -> float:
    return (answers.argmax(dim=1) == labels).double().mean().item()
