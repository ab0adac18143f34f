"""From a checkpoint to a proven artifact, in memory: nothing is written here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from eps_compact import certificate, findings
from eps_compact.artifact import CompactArtifact
from eps_compact.blocks import Block, block_map
from eps_compact.certificate import Proof
from eps_compact.counts import Counts, counts
from eps_compact.findings import Findings
from eps_compact.fingerprint import fingerprint
from eps_compact.folding import fold
from eps_compact.liveness import Liveness
from eps_compact.rewrite import compact
from eps_train import graph
from eps_train.checkpoint import Checkpoint
from eps_train.images import Part
from eps_train.networks import Normalize

PROOF_IMAGES = 256  # held-out images that the proofs are shown at most, spread over all


@dataclass(frozen=True, kw_only=True, slots=True)
class Compaction:
    """A compacted checkpoint.

    Attributes:
        artifact: what is to be saved; its network has passed every proof.
        blocks: the block map of the network as it was built.
        proofs: the comparisons behind the certificate.
        findings: what held-out images showed.
    """

    artifact: CompactArtifact
    blocks: tuple[Block, ...]
    proofs: tuple[Proof, ...]
    findings: Findings

    @property
    def removed(self) -> tuple[str, ...]:
        """Names of the removed blocks, in the order of computation."""
        return self.artifact.network.removed

    @property
    def live(self) -> tuple[Liveness, ...]:
        """The blocks that keep their branch although they have a gate."""
        return tuple(b for b in self.findings.live if b.block not in self.findings.beyond)

    @property
    def counts(self) -> Counts:
        """As `counts.counts` has them."""
        found: Counts = self.artifact.certificate["counts"]
        return found


def compact_checkpoint(
    checkpoint: Checkpoint,
    heldout: Tensor | Part | None,
    *,
    checkpoint_path: str,
    folding: bool = True,
    closed_at_least: float = 1.0,
    also: Iterable[str] = (),
    report: Callable[[str], None] = lambda line: None,
) -> Compaction:
    """Take the dead blocks out of a checkpoint and prove that its network still says the same.

    Args:
        heldout: the validation part, or its images alone, uint8 `[N, C, H, W]`, on the CPU; None:
            the training record and random images must do.
        checkpoint_path: where the artifact says its checkpoint is, relative to its own folder.
        folding: have convolutions take up the batch norms behind them.
        closed_at_least, also: live blocks to take out too, see `findings.blocks_beyond`; what is
            left is not lossless, and the certificate says so.
        report: told what is being done, a line at a time.

    Raises:
        ProofError: the evidence or a proof fails.
        TrainingError: a live block's response is not finite.
        FileFormatError: the checkpoint's tensors are not those of its network.
        GraphError: `also` names a block that has no gate.
    """
    certificate.check_evidence(checkpoint)
    gated = checkpoint.build_gated().eval()
    beyond = findings.blocks_beyond(checkpoint, closed_at_least, also)
    artifact = _artifact(checkpoint, gated, beyond, checkpoint_path)
    shut = artifact.gated(checkpoint) if beyond else gated
    plain = compact(shut)
    folded, artifact.folded = fold(plain) if folding else (plain, ())
    artifact.state = (folded if artifact.folded else plain).state_dict()
    # What is proven is the network that a reader of the file will build, not the one at hand here.
    shipped = artifact.build()
    sizes = ", ".join(map(str, certificate.BATCHES))
    report(f"proving that the logits stay equal at batches {sizes}")
    shape = checkpoint.data.input_shape
    normalize = Normalize.of(checkpoint.data)
    rewritten, refolded = (plain, shipped) if artifact.folded else (shipped, None)
    proofs = certificate.prove(shut, rewritten, normalize, proof_images(heldout, shape), refolded)
    if heldout is not None:
        live = len(checkpoint.gates) - len(checkpoint.dead)
        report(f"measuring {live} live blocks on {len(heldout):,} held-out images")
    seen = findings.look(checkpoint, gated, shut, normalize, heldout, beyond)
    artifact.certificate = certificate.certificate(
        checkpoint,
        proofs=proofs,
        findings=seen,
        closed_at_least=closed_at_least,
        counts=counts(checkpoint.network, artifact.network.removed, plain, shape),
        folded=folded_counts(artifact, shipped),
        network=fingerprint(shipped),
    )
    blocks = _block_map(checkpoint, seen)
    return Compaction(artifact=artifact, blocks=blocks, proofs=proofs, findings=seen)


def _artifact(
    checkpoint: Checkpoint, gated: nn.Module, beyond: tuple[str, ...], checkpoint_path: str
) -> CompactArtifact:
    """Without tensors and certificate."""
    removed = {*checkpoint.network.removed, *checkpoint.dead, *beyond}
    # A network that was trained on after its compaction has no gates where blocks are gone.
    order = checkpoint.network.all_blocks() if checkpoint.network.removed else graph.gates(gated)
    return CompactArtifact(
        network=replace(
            checkpoint.network,
            gated=(),
            removed=tuple(block for block in order if block in removed),
        ),
        state={},
        data=checkpoint.data,
        certificate={},
        checkpoint={"path": checkpoint_path, "digest": checkpoint.digest},
    )


def _block_map(checkpoint: Checkpoint, seen: Findings) -> tuple[Block, ...]:
    """With what was removed although it had not died, now or before training on."""
    removed = {*seen.beyond, *checkpoint.network.removed}
    return tuple(
        replace(block, state="dead") if block.name in removed else block
        for block in block_map(checkpoint, seen.live)
    )


def folded_counts(artifact: CompactArtifact, shipped: nn.Module) -> dict[str, int] | None:
    """Pairs and parameters of a folded artifact's network; None for one as it was trained."""
    if not artifact.folded:
        return None
    parameters = sum(parameter.numel() for parameter in shipped.parameters())
    return {"pairs": len(artifact.folded), "parameters": parameters}


def proof_images(heldout: Tensor | Part | None, shape: tuple[int, int, int]) -> Tensor:
    """Held-out images for the proofs, uint8 `[N, C, H, W]`, N at most `PROOF_IMAGES`, maybe 0."""
    if heldout is None:
        return torch.empty((0, *shape), dtype=torch.uint8)
    if len(heldout) > PROOF_IMAGES:
        chosen = torch.linspace(0, len(heldout) - 1, PROOF_IMAGES).round().long()
        heldout = heldout[chosen]
    return heldout if isinstance(heldout, Tensor) else heldout.images
