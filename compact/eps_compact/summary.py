"""What `eps-compact` says of a compaction: tables and lines for people, one object for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eps_compact.evidence import BlockEvidence
from eps_compact.plots import LEGEND, strip
from eps_core import cli

if TYPE_CHECKING:
    from rich.console import Console

    from eps_compact.compaction import Compaction

NEAREST = 5  # live blocks that the table names
_NAMES = {"blocks": "blocks", "parameters": "parameters", "flops": "FLOPs an image"}


def title(done: Compaction) -> str:
    """Of the block map."""
    parameters, blocks = done.counts["parameters"], done.counts["blocks"]
    if not done.removed:
        return f"{blocks['before']} blocks, none removed: {parameters['before']:,} parameters"
    certificate = done.artifact.certificate
    exact = certificate["lossless"] and "finetune" not in certificate
    lossy = "" if exact else ", not lossless"
    return (
        f"{parameters['before']:,} → {parameters['after']:,} parameters ({_left(parameters)}),"
        f" {blocks['before']} → {blocks['after']} blocks{lossy}"
    )


def show(done: Compaction, log: Console) -> None:
    if not done.removed:
        log.print("no block is dead: the network stays as it is, less gates and side head")
    rows = [
        (name, f"{counts['before']:,}", f"{counts['after']:,}", _left(counts))
        for name, counts in ((name, done.counts[key]) for key, name in _NAMES.items())
    ]
    log.print(cli.table("Compacted", ("", "before", "after", "left"), rows))
    log.print(f"block map: {LEGEND}\n{strip(done.blocks)}", markup=False)
    _show_nearest(done.live, log)
    for line in (*_lossy(done), *_flickering(done), *_proven(done)):
        log.print(line, markup=False)


def to_dict(done: Compaction, checkpoint: str, written: dict[str, str] | None) -> dict[str, Any]:
    """What `--json` prints."""
    certificate = done.artifact.certificate
    told = ("lossless", "evidence", "removed_live", "accuracy", "flicker", "live", "proof")
    return {
        "passed": True,
        "checkpoint": checkpoint,
        "written": written,
        **certificate["counts"],
        "removed": list(done.removed),
        "folding": certificate["folding"],
        **{name: certificate[name] for name in told},
    }


def _lossy(done: Compaction) -> list[str]:
    certificate = done.artifact.certificate
    if "finetune" in certificate:
        return _tuned(certificate["finetune"])
    if certificate["lossless"]:
        return []
    removed = certificate["removed_live"]
    names = ", ".join(f"{entry['block']} ({_closed(entry['closed'])})" for entry in removed)
    blocks = "1 block" if len(removed) == 1 else f"{len(removed)} blocks"
    lines = [f"NOT lossless: {blocks} removed that had not died: {names}"]
    accuracy = certificate["accuracy"]
    if accuracy is None:
        return [*lines, "what that costs in accuracy was not measured: no held-out images"]
    return [
        *lines,
        f"accuracy on {accuracy['samples']:,} held-out images: {accuracy['before']:.2%} before,"
        f" {accuracy['after']:.2%} after",
    ]


def _tuned(told: dict[str, Any]) -> list[str]:
    blocks = ", ".join(told["removed"]) or "none"
    return [
        f"NOT lossless: trained on for {told['epochs']} epochs; removed although they had not died:"
        f" {blocks}",
        f"accuracy on {told['samples']:,} held-out images: {told['whole']:.2%} with them,"
        f" {told['before']:.2%} without, {told['after']:.2%} trained on;"
        f" {told['test']['accuracy']:.2%} of {told['test']['samples']:,} test images",
    ]


def _flickering(done: Compaction) -> list[str]:
    found = done.findings.flicker
    if found is None:
        return []
    blocks = "1 block flickers" if len(found.blocks) == 1 else f"{len(found.blocks)} blocks flicker"
    line = (
        f"{blocks}: kept, gates dropped. Judging each of {found.samples:,} held-out images by"
        f" itself, such a gate would shut on {found.differ:.1%} and have {found.top1_differ:.1%}"
        " named otherwise"
    )
    if found.accuracy is None:
        return [line]
    return [
        f"{line}; accuracy {found.accuracy['addition']:.2%} as shipped,"
        f" {found.accuracy['gate']:.2%} with those gates"
    ]


def _proven(done: Compaction) -> list[str]:
    certificate = done.artifact.certificate
    shown = "held-out and random" if certificate["heldout"] else "random"
    rewriting = [proof for proof in done.proofs if proof.stage == "rewriting"]
    images = sum(proof.samples for proof in rewriting)
    batches = ", ".join(str(size) for size in dict.fromkeys(p.worst_batch for p in rewriting))
    shut = "" if certificate["lossless"] else " with the same blocks shut"
    lines = [
        f"proof: all logits equal (torch.equal, float32) those of the gated network{shut} on"
        f" {images} {shown} images at batches {batches}"
    ]
    if not certificate["heldout"]:
        lines.insert(0, "no held-out images: the evidence is the training record alone")
    if folding := certificate["folding"]:
        worst = max(proof["relative"] for proof in folding["proof"])
        lines.append(
            f"folded: {folding['pairs']} batch norms into convolutions; on the same images logits"
            f" move by {worst:.1e} of the largest at most (limit {folding['bound']:g})"
        )
    return lines


def _show_nearest(live: tuple[BlockEvidence, ...], log: Console) -> None:
    ranked = sorted(
        ((block.ratio, block) for block in live if block.ratio is not None),
        key=lambda pair: pair[0],
    )
    if not ranked:
        return
    rows = [
        (block.block, f"{ratio:.2f} ε", f"{block.quiet or 0:.0%}", _closed(block.closed))
        for ratio, block in ranked[:NEAREST]
    ]
    columns = ("block", "largest |F|", "images under ε", "steps closed, last epoch")
    title = f"Live blocks nearest to dying ({live[0].samples:,} held-out images)"
    log.print(cli.table(title, columns, rows))


def _closed(share: float | None) -> str:
    return "held open" if share is None else f"{share:.0%}"


def _left(counts: dict[str, int]) -> str:
    return f"{counts['after'] / counts['before']:.1%}"
