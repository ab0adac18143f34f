"""Evidence about live blocks: activation statistics and train/inference gap on held-out images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from eps_core.errors import GraphError, TrainingError
from eps_train.data.images import Part
from eps_train.gating import rewriting
from eps_train.gating.gate import LEAST_RMS, EpsilonGate
from eps_train.gating.pruning_state import watch_gates
from eps_train.training.checkpoint import Checkpoint, GateRecord
from eps_train.training.evaluate import logits

# -- Activation statistics: the largest response of each live block's branch


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockEvidence:
    """One block whose gate is not latched.

    Attributes:
        block: its name.
        epsilon: its last threshold, in units of the response; 0: it had none.
        peak: largest response on held-out images, in evaluation mode; None: not measured.
        quiet: share of samples whose own response is at most epsilon (0..1): those on which a
            plain addition differs from a gate that judges each sample by itself.
        samples: images in that pass.
        closed: share of the last epoch's training steps on which the gate was closed (0..1); None
            if it was held open (epsilon 0).
    """

    block: str
    epsilon: float
    peak: float | None
    quiet: float | None
    samples: int
    closed: float | None

    @property
    def ratio(self) -> float | None:
        """`peak / epsilon`: at most 1 where no held-out image opens the gate; None if unknown."""
        return self.peak / self.epsilon if self.epsilon and self.peak is not None else None


def closed_share(record: GateRecord) -> float | None:
    """Share of the last epoch's steps on which a gate was closed; None if it was held open."""
    return record.closed_steps / record.steps if record.epsilon and record.steps else None


def block_evidence(
    checkpoint: Checkpoint, responses: Mapping[str, Tensor] | None
) -> tuple[BlockEvidence, ...]:
    """Return the evidence about a checkpoint's live blocks, in the order of computation.

    Args:
        responses: of every live block, from :func:`observe`; None: the training record alone.
    """
    found = []
    for record in checkpoint.gates:
        if record.death is not None:
            continue
        # A run may end with its live gates held open: the run's own epsilon then applies.
        epsilon = record.epsilon or float(checkpoint.config.get("epsilon") or 0.0)
        peak = quiet = response = None
        if responses is not None:
            response = responses[record.block]
            peak = response.max().item()
            quiet = _share(response <= epsilon) if epsilon else 0.0
        found.append(
            BlockEvidence(
                block=record.block,
                epsilon=epsilon,
                peak=peak,
                quiet=quiet,
                samples=0 if response is None else len(response),
                closed=closed_share(record),
            )
        )
    return tuple(found)


def observe(
    model: nn.Module, normalize: nn.Module, images: Tensor | Part, blocks: Iterable[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run `model` in evaluation mode and record the responses of the named gated blocks.

    Latched gates are closed and all others open: what is measured is the network that ships.

    Args:
        images: uint8 `[N, C, H, W]`, or a part of a data set, read in batches.

    Returns:
        Logits float32 `[N, classes]`, and by block each sample's response, float32 `[N]`.

    Raises:
        TrainingError: a response is not finite.
    """
    gates = rewriting.gates(model)
    device = next(iter(model.parameters())).device
    with watch_gates({block: gates[block] for block in blocks}, sample_responses) as peaks:
        answers = logits(model, normalize, images.to(device))
    responses = {block: torch.cat(batches).cpu() for block, batches in peaks.items()}
    for block, response in responses.items():
        if not bool(response.isfinite().all()):
            raise TrainingError(
                f"block {block}: its response on held-out images is not finite; train again"
            )
    return answers.cpu(), responses


def sample_responses(gate: EpsilonGate, shortcut: Tensor, branch: Tensor) -> Tensor:
    """Return each sample's response, float32 `[N]`, as `gate` measures that of a batch."""
    peaks = branch.float().abs().flatten(1).amax(dim=1)
    if not gate.relative:
        return peaks
    rms = shortcut.float().flatten(1).square().mean(dim=1).sqrt()
    return peaks / rms.clamp(min=LEAST_RMS)


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()


# -- The train/inference gap of live gates: they ship as plain additions
#
# In training a gate judges a whole batch, so that a result depends on its neighbours; what is
# served must not. The plain addition is compared with the gate judging each image by itself.


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeGap:
    """Plain additions against gates that judge each image by itself, on held-out images.

    Attributes:
        blocks: those whose gates were closed on steps of the last epoch, in the order of
            computation.
        samples: images.
        differ: share of the images on which at least one gate closed (0..1).
        top1_differ: share of the images whose top-1 class then differs.
        accuracy: top-1 (0..1) of both, `addition` and `gate`; None if labels are not known.
    """

    blocks: tuple[str, ...]
    samples: int
    differ: float
    top1_differ: float
    accuracy: dict[str, float] | None


def mode_gap(
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
        answers: logits float32 `[N, classes]` with plain additions.
        labels: int64 `[N]`, or None.
    """
    gates = rewriting.gates(model)
    closed: dict[str, list[Tensor]] = {block: [] for block in gates if block in thresholds}

    def judge(
        gate: EpsilonGate, operands: tuple[Tensor, Tensor], output: Tensor, *, block: str
    ) -> Tensor:
        shortcut, branch = operands
        flags = sample_responses(gate, shortcut, branch) <= thresholds[block]
        closed[block].append(flags)
        return torch.where(flags.view(-1, *[1] * (branch.dim() - 1)), shortcut, output)

    with ExitStack() as hooks:
        for block in closed:
            handle = gates[block].register_forward_hook(partial(judge, block=block))
            hooks.callback(handle.remove)
        device = next(iter(model.parameters())).device
        judged = logits(model, normalize, images.to(device)).cpu()
    by_block = torch.stack([torch.cat(batches).cpu() for batches in closed.values()])
    before, after = answers.argmax(dim=1), judged.argmax(dim=1)
    return ModeGap(
        blocks=tuple(closed),
        samples=len(answers),
        differ=_share(by_block.any(dim=0)),
        top1_differ=_share(before != after),
        accuracy=None
        if labels is None
        else {"addition": _share(before == labels), "gate": _share(after == labels)},
    )


# -- All evidence of a compaction besides the records of dead blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationStatistics:
    """Measurements on held-out images.

    Attributes:
        images: held-out images that were used; 0: the training record is the only evidence.
        beyond: blocks that were removed although they are not dead: not lossless.
        live: every block that is not dead, including those of `beyond`.
        gap: train/inference gap of the blocks that stay and whose gates were closed on steps of the
            last epoch; None without such blocks, or without images.
        accuracy: where `beyond` is not empty: top-1 (0..1) on the held-out images `before` and
            `after` its removal, and `samples`; None if not measured.
    """

    images: int
    beyond: tuple[str, ...]
    live: tuple[BlockEvidence, ...]
    gap: ModeGap | None = None
    accuracy: dict[str, float] | None = None


def blocks_beyond(
    checkpoint: Checkpoint, closed_at_least: float, also: Iterable[str] = ()
) -> tuple[str, ...]:
    """Return the live blocks to remove, in the order of computation.

    Those whose gate was closed on that share of the last epoch's steps, as in the authors' table of
    thresholds (paper, section 5), and those of `also`. At 1 only the latter.

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


def measure_activations(
    checkpoint: Checkpoint,
    gated: nn.Module,
    shut: nn.Module,
    normalize: nn.Module,
    heldout: Tensor | Part | None,
    beyond: tuple[str, ...] = (),
) -> ActivationStatistics:
    """Measure every live block.

    Args:
        gated: the checkpoint's network with its dead gates latched.
        shut: the same with the gates of `beyond` latched too.
        heldout: images uint8 `[N, C, H, W]`, or a part of a data set, whose labels are then used;
            None: nothing is measured.
        beyond: live blocks to remove.

    Raises:
        TrainingError: a response is not finite.
    """
    if heldout is None:
        live = block_evidence(checkpoint, None)
        return ActivationStatistics(images=0, beyond=beyond, live=live)
    labels = None if isinstance(heldout, Tensor) else heldout.labels.cpu()
    watched = [record.block for record in checkpoint.gates if record.death is None]
    before, responses = observe(gated, normalize, heldout, watched)
    live = block_evidence(checkpoint, responses)
    answers = logits(shut, normalize, heldout) if beyond else before
    accuracy = gap = None
    if beyond and labels is not None:
        accuracy = {
            "before": _share(before.argmax(dim=1) == labels),
            "after": _share(answers.argmax(dim=1) == labels),
            "samples": len(labels),
        }
    # A gate that no training batch closed any more has nothing to judge.
    thresholds = {
        block.block: block.epsilon for block in live if block.closed and block.block not in beyond
    }
    if thresholds:
        gap = mode_gap(shut, normalize, heldout, thresholds, answers, labels)
    return ActivationStatistics(
        images=len(heldout), beyond=beyond, live=live, gap=gap, accuracy=accuracy
    )
