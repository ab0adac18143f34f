"""From a checkpoint to a proven artifact, in memory: nothing is written here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from eps_compact import certificate
from eps_compact.artifact import CompactArtifact
from eps_compact.blocks import Block, block_map
from eps_compact.certificate import Proof
from eps_compact.liveness import Liveness, liveness
from eps_compact.rewrite import compact
from eps_train.checkpoint import Checkpoint
from eps_train.cost import Cost, cost
from eps_train.networks import Normalize


@dataclass(frozen=True, kw_only=True, slots=True)
class Compaction:
    """A compacted checkpoint.

    Attributes:
        artifact: what is to be saved; its network has passed every proof.
        blocks: the block map of the network as it was built.
        before, after: cost of the gated network at full depth, and of the compact one; without
            the side head, which is never deployed.
        proofs: the comparisons behind the certificate.
        live: the blocks that keep their branch although they have a gate.
    """

    artifact: CompactArtifact
    blocks: tuple[Block, ...]
    before: Cost
    after: Cost
    proofs: tuple[Proof, ...]
    live: tuple[Liveness, ...]

    @property
    def removed(self) -> tuple[str, ...]:
        """Names of the removed blocks, in the order of computation."""
        return self.artifact.network.removed

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """`blocks`, `parameters` and `flops` (of one image), each `before` and `after`."""
        counts: dict[str, dict[str, int]] = self.artifact.certificate["counts"]
        return counts


def compact_checkpoint(
    checkpoint: Checkpoint,
    heldout: Tensor,
    *,
    checkpoint_path: str,
    report: Callable[[str], None] = lambda line: None,
) -> Compaction:
    """Take the dead blocks out of a checkpoint and prove that its network still says the same.

    Args:
        checkpoint: as read from its file; without dead blocks the network stays as it is.
        heldout: validation images uint8 `[N, C, H, W]`, on the CPU.
        checkpoint_path: where the artifact says its checkpoint is, relative to its own folder.
        report: told what is being done, a line at a time.

    Raises:
        ProofError: the evidence or the proof fails.
        TrainingError: a live block's response is not finite.
        FileFormatError: the checkpoint's tensors are not those of its network.
    """
    certificate.check_evidence(checkpoint)
    gated = checkpoint.build_gated().eval()
    dead = (*checkpoint.network.removed, *checkpoint.dead)
    artifact = CompactArtifact(
        network=replace(checkpoint.network, gated=(), removed=dead),
        state=compact(gated).state_dict(),
        data=checkpoint.data,
        certificate={},
        checkpoint={"path": checkpoint_path, "digest": checkpoint.digest},
    )
    # What is proven is the network that a reader of the file will build, not the one at hand here.
    plain = artifact.build()
    normalize = Normalize(list(checkpoint.data.mean), list(checkpoint.data.std))
    sizes = ", ".join(map(str, certificate.BATCHES))
    report(f"proving that the logits stay equal at batches {sizes}")
    proofs = certificate.prove(gated, plain, normalize, heldout)
    if live_count := len(checkpoint.gates) - len(checkpoint.dead):
        report(f"measuring {live_count} live blocks on {len(heldout):,} held-out images")
    live = liveness(checkpoint, gated, normalize, heldout)
    blocks = block_map(checkpoint, live)
    shape = checkpoint.data.input_shape
    before, after = cost(gated, shape), cost(plain, shape)
    left = sum(block.state != "dead" for block in blocks)
    artifact.certificate = certificate.certificate(
        checkpoint,
        proofs=proofs,
        live=live,
        counts={
            "blocks": {"before": len(blocks), "after": left},
            "parameters": {"before": before.parameters, "after": after.parameters},
            "flops": {"before": before.flops, "after": after.flops},
        },
    )
    return Compaction(
        artifact=artifact, blocks=blocks, before=before, after=after, proofs=proofs, live=live
    )
