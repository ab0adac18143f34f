"""Certificate of a compaction: evidence for every removed block, and proof of equal logits.

Rewriting (removal of blocks and gates) must keep logits equal to the last bit; folding may change
them by rounding. Live blocks are measured on held-out images. All of it runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from eps_core.checks import Parity, compare_logits
from eps_core.errors import EpsError, GraphError, TrainingError
from eps_train.data.images import Part
from eps_train.gating import rewriting
from eps_train.gating.gate import LEAST_RMS, EpsilonGate
from eps_train.gating.pruning_state import watch_gates
from eps_train.gating.tracing import in_mode
from eps_train.training.checkpoint import Checkpoint, GateRecord
from eps_train.training.evaluate import logits
from eps_train.training.forward import cpu_threads

BATCHES = (1, 7, 32)  # kernels are chosen by batch size, so each is compared with itself
ROUNDS = 2  # batches of each size and each kind of input
SEED = 0  # of the random images
AT_ONCE = 4  # batches that are computed in parallel, each of which takes memory
REWRITING, FOLDING = "rewriting", "folding"  # stages of the proof
BOUND = 1e-5  # of the folding, relative to the largest logit
_SLACK = 1e-6  # relative; epsilon is a float32 number on the gate


class ProofError(EpsError):
    """The compact network differs from the gated one, or a removed block is not dead."""


def as_json(record: object) -> Any:
    """Return a record as JSON holds it: lists for tuples, None for what is no number."""
    return msgspec.json.decode(msgspec.json.encode(record))


# -- Proof: equal logits


def failure(proof: Parity) -> str:
    """One line for a proof that has not passed."""
    where = f"on {proof.inputs} at batch {proof.worst_batch}"
    if proof.stage == REWRITING:
        finite = proof.max_abs is not None
        amount = f"by up to {proof.max_abs:g}" if finite else "logits that are not finite"
        return (
            f"the compact network differs from the gated one {where} ({amount}); train again,"
            " or report this as a bug"
        )
    amount = "makes logits that are not finite"
    if proof.relative is not None:
        amount = f"moves logits by {proof.relative:.1e} of the largest, more than {proof.limit:g},"
    return f"folding {amount} {where}; keep it unfolded with --no-fold"


def compare(
    networks: Sequence[nn.Module], normalize: nn.Module, heldout: Tensor
) -> tuple[Parity, ...]:
    """Compare logits of a gated network, the plain one and, if there is one, the folded one.

    Each is compared with the one before it, in evaluation mode. Inputs are `heldout` (uint8
    `[N, C, H, W]`; N may be 0) and random images, at every batch size of `BATCHES`. All comparisons
    of rewriting come before all of folding.

    Every batch is computed on one thread, several batches in parallel: threads that share one small
    layer mostly wait for each other.
    """
    # The largest first, so that none of them is left over at the end.
    shown = [(size, *named) for size in reversed(BATCHES) for named in _inputs(heldout, size)]
    batches = [batch for size, _, images in shown for batch in images.split(size)]

    def answers(batch: Tensor) -> list[Tensor]:
        return [logits(network, normalize, batch) for network in networks]

    workers = min(torch.get_num_threads(), AT_ONCE)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    with ExitStack() as modes:
        for network in networks:  # before threads share them: `logits` restores what it finds
            modes.enter_context(in_mode(network, False))
        with cpu_threads(1), pool:
            said = iter(list(pool.map(answers, batches)))
    proofs = []
    for size, inputs, _ in shown:
        each = zip(*islice(said, ROUNDS), strict=True)
        expected, found, *others = (torch.cat(batched).numpy() for batched in each)
        pairs = [(REWRITING, 0.0, expected, found)]
        pairs += [(FOLDING, BOUND, found, rounded) for rounded in others]
        proofs += [
            compare_logits(stage, [a], [b], batches=[size], limit=limit, inputs=inputs)
            for stage, limit, a, b in pairs
        ]
    return tuple(sorted(proofs, key=lambda proof: (proof.stage == FOLDING, proof.worst_batch)))


def _inputs(heldout: Tensor, size: int) -> Iterator[tuple[str, Tensor]]:
    """Yield named images uint8 `[ROUNDS * size, C, H, W]`; too few held-out ones repeat."""
    count = ROUNDS * size
    if len(heldout):
        # Other sizes start elsewhere, so that together they see more of the images.
        yield "held-out images", heldout[torch.arange(size, size + count) % len(heldout)]
    generator = torch.Generator().manual_seed(SEED + size)
    noise = torch.randint(0, 256, (count, *heldout.shape[1:]), generator=generator)
    yield "random uint8 images", noise.to(torch.uint8)


def prove(
    networks: Sequence[nn.Module], normalize: nn.Module, heldout: Tensor
) -> tuple[Parity, ...]:
    """Prove that rewriting changed no bit of the logits, and folding no more than `BOUND`.

    Arguments and result are those of :func:`compare`. Raises ProofError for the first comparison
    that fails; it names the inputs, the batch size, and the largest difference.
    """
    proofs = compare(networks, normalize, heldout)
    for proof in proofs:
        if not proof.passed:
            raise ProofError(failure(proof))
    return proofs


# -- Evidence for dead blocks: the training record


def check_evidence(checkpoint: Checkpoint) -> None:
    """Raise ProofError when a dead block's record does not show responses within epsilon."""
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


def prune_records(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the name of every dead block with the evidence for it."""
    return [
        {"block": record.block, **asdict(record.death)}
        for record in checkpoint.gates
        if record.death is not None
    ]


# -- Evidence about live blocks: the largest response of each branch on held-out images


@dataclass(frozen=True, slots=True)
class BlockEvidence:
    """One block whose gate is not latched.

    Attributes:
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

    `responses` are those of every live block, from :func:`observe`; None: not measured.
    """
    found = []
    for record in checkpoint.gates:
        if record.death is not None:
            continue
        # A run may end with its live gates held open: the run's own epsilon then applies.
        epsilon = record.epsilon or float(checkpoint.config.get("epsilon") or 0.0)
        peak, quiet, samples = None, None, 0
        if responses is not None:
            response = responses[record.block]
            peak, samples = response.max().item(), len(response)
            quiet = _share(response <= epsilon) if epsilon else 0.0
        closed = closed_share(record)
        found.append(BlockEvidence(record.block, epsilon, peak, quiet, samples, closed))
    return tuple(found)


def observe(
    model: nn.Module, normalize: nn.Module, images: Tensor | Part, blocks: Iterable[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run `model` in evaluation mode and record the responses of the named gated blocks.

    Latched gates are closed and all others open: what is measured is the network that ships.
    Returns logits float32 `[N, classes]`, and by block each sample's response, float32 `[N]`.
    Raises TrainingError when a response is not finite.
    """
    gates = rewriting.gates(model)
    with watch_gates({block: gates[block] for block in blocks}, sample_responses) as peaks:
        answers = logits(model, normalize, images)
    responses = {block: torch.cat(batches) for block, batches in peaks.items()}
    for block, response in responses.items():
        if not bool(response.isfinite().all()):
            raise TrainingError(
                f"block {block}: its response on held-out images is not finite; train again"
            )
    return answers, responses


def sample_responses(gate: EpsilonGate, shortcut: Tensor, branch: Tensor) -> Tensor:
    """Return each sample's response, float32 `[N]`, as `gate` measures that of a batch."""
    peaks = branch.float().abs().flatten(1).amax(dim=1)
    if not gate.relative:
        return peaks
    rms = shortcut.float().flatten(1).square().mean(dim=1).sqrt()
    return peaks / rms.clamp(min=LEAST_RMS)


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeGap:
    """Train/inference gap of live gates: they ship as plain additions.

    In training a gate judges a whole batch, so that a result depends on its neighbours; what is
    served must not. Plain additions are compared with gates that judge each image by itself.

    Attributes:
        blocks: those whose gates were closed on steps of the last epoch, in the order of
            computation.
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

    Its own gates are left as they are.

    Args:
        thresholds: epsilon of the gates that judge, by block; one or more.
        answers: logits float32 `[N, classes]` with plain additions.
    """
    gates = rewriting.gates(model)
    closed: dict[str, list[Tensor]] = {block: [] for block in gates if block in thresholds}

    def judge(
        block: str, gate: EpsilonGate, operands: tuple[Tensor, Tensor], output: Tensor
    ) -> Tensor:
        shortcut, branch = operands
        flags = sample_responses(gate, shortcut, branch) <= thresholds[block]
        closed[block].append(flags)
        return torch.where(flags.view(-1, *[1] * (branch.dim() - 1)), shortcut, output)

    with ExitStack() as hooks:
        for block in closed:
            hooks.callback(gates[block].register_forward_hook(partial(judge, block)).remove)
        judged = logits(model, normalize, images)
    by_block = torch.stack([torch.cat(batches) for batches in closed.values()])
    before, after = answers.argmax(dim=1), judged.argmax(dim=1)
    accuracy = None
    if labels is not None:
        accuracy = {"addition": _share(before == labels), "gate": _share(after == labels)}
    return ModeGap(
        blocks=tuple(closed),
        samples=len(answers),
        differ=_share(by_block.any(dim=0)),
        top1_differ=_share(before != after),
        accuracy=accuracy,
    )


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
    if closed_at_least < 1:
        shares = {record.block: closed_share(record) or 0.0 for record in checkpoint.gates}
        named |= {block for block, share in shares.items() if share >= closed_at_least}
    return tuple(r.block for r in checkpoint.gates if r.death is None and r.block in named)


def measure_activations(
    checkpoint: Checkpoint,
    gated: nn.Module,
    shut: nn.Module,
    normalize: nn.Module,
    heldout: Tensor | Part | None,
    beyond: tuple[str, ...] = (),
) -> ActivationStatistics:
    """Measure every live block. Raises TrainingError when a response is not finite.

    Args:
        gated: the checkpoint's network with its dead gates latched.
        shut: the same with the gates of `beyond`, live blocks to remove, latched too.
        heldout: images uint8 `[N, C, H, W]`, or a part of a data set, whose labels are then used;
            None: nothing is measured.
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
