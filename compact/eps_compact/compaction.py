"""Compaction of a checkpoint in memory: remove dead blocks and gates, fold, prove, certify."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from eps_compact import certificate
from eps_compact.artifact import CompactArtifact, fingerprint
from eps_compact.certificate import BOUND, FOLDING, REWRITING, ActivationStatistics, BlockEvidence
from eps_compact.plots import Block, block_map
from eps_core.checks import Parity
from eps_core.cli import Log
from eps_train.data.images import Part
from eps_train.data.inputs import Batch, pixels
from eps_train.gating import rewriting
from eps_train.gating.folding import fold
from eps_train.gating.pruner import BlockPruner
from eps_train.models.resnets import Normalize
from eps_train.models.spec import cost, count_parameters
from eps_train.training.checkpoint import Checkpoint, current_versions

PROOF_IMAGES = 256  # held-out images for the proofs at most, spread over all

Counts = dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compaction:
    """A compacted checkpoint.

    Attributes:
        artifact: what is to be saved; its network has passed every proof.
        checkpoint: what was compacted.
        blocks: the block map of the network as it was built.
        proofs, statistics: the comparisons and the measurements behind the certificate.
    """

    artifact: CompactArtifact
    checkpoint: Checkpoint
    blocks: tuple[Block, ...]
    proofs: tuple[Parity, ...]
    statistics: ActivationStatistics

    def build(self) -> fx.GraphModule:
        """Build the compact network, in evaluation mode, on the CPU: plain layers, no gates."""
        return self.artifact.build()

    @property
    def certificate(self) -> dict[str, Any]:
        """Evidence for every removed block and proof of equal logits, as plain data."""
        return self.artifact.certificate

    @property
    def counts(self) -> Counts:
        """Blocks, parameters and FLOPs; see :func:`counts`."""
        return cast(Counts, self.certificate["counts"])

    @property
    def removed(self) -> tuple[str, ...]:
        """Names of the removed blocks, in the order of computation."""
        return self.artifact.network.removed

    @property
    def live(self) -> tuple[BlockEvidence, ...]:
        """The blocks that keep their branch although they have a gate."""
        return tuple(b for b in self.statistics.live if b.block not in self.statistics.beyond)


def compact(model: nn.Module, dead: Iterable[str] | None = None) -> fx.GraphModule:
    """Return a plain network without gates and taps that computes what `model` does.

    Dead blocks are removed (a first block of a stage leaves its shortcut behind), live gates become
    plain additions. The result is in evaluation mode and shares nothing with `model`: it is a copy,
    so training one does not alter the other, and `model` keeps its mode and its gates.

    Args:
        model: any network that torch.fx can trace and whose residual additions are `EpsilonGate`s;
            without gates it is returned unchanged, as a graph.
        dead: names of gated blocks to remove besides those whose gates are latched.

    Raises:
        GraphError: `model` cannot be traced, or has no gated block of that name.
    """
    # A graph is copied once it is small; a module is traced as a copy, in evaluation mode only:
    # what reads `self.training` is frozen as it ships.
    if isinstance(model, fx.GraphModule):
        traced = model
    else:
        traced = rewriting.trace(copy.deepcopy(model).eval(), one_mode=True)
    latched = {name for name, gate in rewriting.gates(traced).items() if bool(gate.dead)}
    less = rewriting.remove_blocks(traced, latched.union(dead or ()))
    plain = copy.deepcopy(rewriting.drop_taps(rewriting.drop_gates(less))).eval()
    plain.zero_grad(set_to_none=True)  # the gradients of the last step are no part of a network
    return plain


def compact_pruner(
    pruner: BlockPruner,
    heldout: Iterable[Batch] | None = None,
    *,
    averaged: nn.Module | None = None,
    folding: bool = True,
    report: Log = lambda line: None,
) -> Compaction:
    """Compact the network of a `BlockPruner`, without any file: :func:`compact_checkpoint`.

    Args:
        heldout: batches for the proof and the statistics, normalised as in training: inputs, or
            inputs and labels; None: random images only.
        averaged: an average of the weights that ships in place of the trained ones.

    Raises:
        DataError: `heldout` is empty, or its images are not normalised as the pruner was told.
    """
    checkpoint = pruner.checkpoint(averaged)
    images = None if heldout is None else pixels(heldout, checkpoint.data)
    return compact_checkpoint(
        checkpoint, images, checkpoint_path="", folding=folding, report=report
    )


def compact_checkpoint(
    checkpoint: Checkpoint,
    heldout: Tensor | Part | None,
    *,
    checkpoint_path: str,
    folding: bool = True,
    closed_at_least: float = 1.0,
    also: Iterable[str] = (),
    report: Log = lambda line: None,
) -> Compaction:
    """Remove the dead blocks of a checkpoint and prove that its network computes the same.

    Args:
        heldout: the validation part, or its images alone, uint8 `[N, C, H, W]`, on the CPU; None:
            only the training record and random images are used.
        checkpoint_path: path of the checkpoint for the artifact, relative to its own folder.
        folding: fold batch norms into the convolutions before them.
        closed_at_least, also: live blocks to remove too, see `certificate.blocks_beyond`; the
            result is then not lossless, and the certificate says so.

    Raises:
        ProofError: the evidence or a proof fails.
        TrainingError: a live block's response is not finite.
        FileFormatError: the checkpoint's tensors are not those of its network.
        GraphError: `also` names a block that has no gate.
    """
    certificate.check_evidence(checkpoint)
    gated = checkpoint.build_gated().eval()
    beyond = certificate.blocks_beyond(checkpoint, closed_at_least, also)
    removed = {*checkpoint.network.removed, *checkpoint.dead, *beyond}
    # A network that was fine-tuned after its compaction has no gates where blocks are gone.
    blocks = checkpoint.network.all_blocks() if checkpoint.network.removed else ()
    ordered = tuple(block for block in blocks or rewriting.gates(gated) if block in removed)
    artifact = CompactArtifact(
        network=replace(checkpoint.network, gated=(), removed=ordered),
        state={},
        data=checkpoint.data,
        certificate={},
        checkpoint={"path": checkpoint_path, "digest": checkpoint.digest},
    )
    shut = artifact.gated(checkpoint) if beyond else gated
    plain = compact(shut)
    folded, artifact.folded = fold(plain) if folding else (plain, ())
    artifact.state = (folded if artifact.folded else plain).state_dict()

    # What is proven is the network that a reader of the file will build, not the one at hand here.
    shipped = artifact.build()
    sizes = ", ".join(map(str, certificate.BATCHES))
    report(f"proving that the logits stay equal at batches {sizes}")
    normalize = Normalize.of(checkpoint.data)
    images = proof_images(heldout, checkpoint.data.input_shape)
    networks = [shut, plain, shipped] if artifact.folded else [shut, shipped]
    proofs = certificate.prove(networks, normalize, images)
    if heldout is not None:
        live = len(checkpoint.gates) - len(checkpoint.dead)
        report(f"measuring {live} live blocks on {len(heldout):,} held-out images")
    statistics = certificate.measure_activations(
        checkpoint, gated, shut, normalize, heldout, beyond
    )
    artifact.certificate = _certificate(
        checkpoint, artifact, plain, shipped, proofs, statistics, closed_at_least
    )
    return Compaction(
        artifact=artifact,
        checkpoint=checkpoint,
        blocks=block_map(checkpoint, statistics.live, removed=removed),
        proofs=proofs,
        statistics=statistics,
    )


def _certificate(
    checkpoint: Checkpoint,
    artifact: CompactArtifact,
    plain: fx.GraphModule,
    shipped: fx.GraphModule,
    proofs: tuple[Parity, ...],
    statistics: ActivationStatistics,
    closed_at_least: float,
) -> dict[str, Any]:
    """Return the certificate as plain data; see docs/files.md."""
    live = [{**asdict(block), "ratio": block.ratio} for block in statistics.live]
    proven: dict[str, list[dict[str, Any]]] = {REWRITING: [], FOLDING: []}
    for proof in proofs:
        proven[proof.stage].append(
            {
                "step": proof.stage,
                "inputs": proof.inputs,
                "batch": proof.worst_batch,
                "images": proof.samples,
                "equal": proof.max_abs == 0,
                "max_abs": proof.max_abs,
                "relative": proof.relative,
                "bound": proof.limit,
            }
        )
    heldout = " and held-out images" if statistics.images else " alone"
    folded = folded_counts(artifact, shipped)
    data = checkpoint.data
    return {
        "lossless": not statistics.beyond,
        "evidence": f"training record{heldout}",
        "relative_epsilon": checkpoint.relative_epsilon,
        "heldout": statistics.images,
        "removed": certificate.prune_records(checkpoint),
        "closed_at_least": closed_at_least,
        "removed_live": [entry for entry in live if entry["block"] in statistics.beyond],
        "accuracy": statistics.accuracy,
        "proof": proven[REWRITING],
        "folding": folded and {"bound": BOUND, **folded, "proof": proven[FOLDING]},
        "live": [entry for entry in live if entry["block"] not in statistics.beyond],
        "flicker": certificate.as_json(statistics.gap),
        "counts": counts(checkpoint, artifact.network.removed, plain),
        "network": fingerprint(shipped),
        "data": {
            "name": data.name,
            "sha256": data.sha256,
            "split_seed": data.split_seed,
            "sizes": dict(data.sizes),
        },
        "checkpoint": checkpoint.digest,
        "versions": dict(checkpoint.versions),
        "made_with": current_versions(),
    }


def counts(checkpoint: Checkpoint, removed: Collection[str], plain: nn.Module) -> Counts:
    """Count `blocks`, `parameters` and `flops` (of one image), each `before` and `after`.

    Before is the network at full depth, without the side head, which is never deployed; after is
    `plain`, the compact network without folding, which lacks the blocks `removed`.
    """
    shape = checkpoint.data.input_shape
    skeleton = checkpoint.network.skeleton()
    blocks = len(rewriting.gates(skeleton))
    before, after = cost(skeleton, shape), cost(plain, shape)
    return {
        "blocks": {"before": blocks, "after": blocks - len(removed)},
        "parameters": {"before": before.parameters, "after": after.parameters},
        "flops": {"before": before.flops, "after": after.flops},
    }


def folded_counts(artifact: CompactArtifact, shipped: nn.Module) -> dict[str, int] | None:
    """Count pairs and parameters of a folded artifact's network; None if it is not folded."""
    if not artifact.folded:
        return None
    return {"pairs": len(artifact.folded), "parameters": count_parameters(shipped)}


def proof_images(heldout: Tensor | Part | None, shape: tuple[int, int, int]) -> Tensor:
    """Return up to `PROOF_IMAGES` held-out images, uint8 `[N, C, H, W]`; N may be 0."""
    if heldout is None:
        return torch.empty((0, *shape), dtype=torch.uint8)
    if len(heldout) > PROOF_IMAGES:
        heldout = heldout[torch.linspace(0, len(heldout) - 1, PROOF_IMAGES).round().long()]
    return heldout if isinstance(heldout, Tensor) else heldout.images
