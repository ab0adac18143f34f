"""What held-out images say about a checkpoint's blocks: liveness, flicker, what a removal costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from eps_compact.flicker import Flicker, flicker
from eps_compact.liveness import Liveness, closed_share, live_blocks, liveness, observe
from eps_train.checkpoint import Checkpoint
from eps_train.errors import GraphError
from eps_train.evaluate import logits
from eps_train.images import Part


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
    live: tuple[Liveness, ...]
    flicker: Flicker | None
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
