"""What held-out images say of the live blocks, against a plain recomputation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from eps_compact.compaction import compact
from eps_compact.evidence import Findings, blocks_beyond, look
from eps_core.errors import GraphError
from eps_train.data import dataset
from eps_train.data.images import ImageSet, Part
from eps_train.gating import rewriting
from eps_train.models.cifar import Normalize
from eps_train.training.checkpoint import Checkpoint
from tests.checkpoints import make_checkpoint

DEAD = ("stages.0.1",)
FLICKERING = "stages.1.1"


@pytest.fixture(scope="module")
def heldout() -> Part:
    return dataset.load("digits").validation


def flickering(epsilon: float = 2.5, closed: int = 3) -> Checkpoint:
    """Only one gate was closed on steps of the last epoch."""
    checkpoint = make_checkpoint(dead=DEAD, depth=14)
    checkpoint.gates = [
        replace(record, epsilon=epsilon, closed_steps=closed)
        if record.block == FLICKERING
        else record
        if record.death
        else replace(record, closed_steps=0)
        for record in checkpoint.gates
    ]
    return checkpoint


def normalize(checkpoint: Checkpoint) -> Normalize:
    return Normalize.of(checkpoint.data)


def seen(
    checkpoint: Checkpoint, heldout: Tensor | Part | None, beyond: tuple[str, ...] = ()
) -> Findings:
    gated, shut = checkpoint.build_gated().eval(), checkpoint.build_gated().eval()
    for block in beyond:
        rewriting.gates(shut)[block].latch()
    return look(checkpoint, gated, shut, normalize(checkpoint), heldout, beyond)


def answers(model: nn.Module, checkpoint: Checkpoint, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(normalize(checkpoint)(images))
    return found


def test_a_gate_that_judges_each_image(heldout: Part) -> None:
    """Whole networks with and without the branch give the answers of a gate open and shut."""
    checkpoint = flickering()
    peaks = {block.block: block for block in seen(checkpoint, heldout).live}[FLICKERING]
    assert peaks.peak is not None
    epsilon = peaks.peak * 0.8
    checkpoint = flickering(epsilon)
    found = seen(checkpoint, heldout).flicker
    assert found is not None
    assert found.blocks == (FLICKERING,)
    assert found.samples == len(heldout)
    gated = checkpoint.build_gated()
    with_branch = answers(gated, checkpoint, heldout.images)
    without = answers(compact(gated, [FLICKERING]), checkpoint, heldout.images)
    quiet = {block.block: block for block in seen(checkpoint, heldout).live}[FLICKERING].quiet
    assert quiet is not None
    assert 0 < quiet < 1, "otherwise nothing is tested"
    assert found.differ == quiet
    branch: list[Tensor] = []
    rewriting.gates(gated)[FLICKERING].register_forward_pre_hook(
        lambda g, args: branch.append(args[1])
    )
    answers(gated, checkpoint, heldout.images)
    shut = branch[0].abs().amax(dim=(1, 2, 3)) <= epsilon
    judged = torch.where(shut[:, None], without, with_branch)
    labels = heldout.labels
    shares = [(a.argmax(1) == labels).double().mean().item() for a in (with_branch, judged)]
    assert found.accuracy is not None
    assert list(found.accuracy) == ["addition", "gate"]
    assert list(found.accuracy.values()) == pytest.approx(shares)
    changed = (with_branch.argmax(1) != judged.argmax(1)).double().mean().item()
    assert found.top1_differ == pytest.approx(changed)


def test_gates_that_no_batch_shut_are_not_judged(heldout: Part) -> None:
    assert seen(flickering(closed=0), heldout).flicker is None
    assert seen(flickering(epsilon=0.0), heldout).flicker is None, "it was held open"
    assert seen(flickering(), heldout, (FLICKERING,)).flicker is None, "it is gone"


def test_images_alone_give_no_accuracy(heldout: Part) -> None:
    found = seen(flickering(), heldout.images).flicker
    assert found is not None
    assert found.accuracy is None
    assert seen(flickering(), heldout.images, (FLICKERING,)).accuracy is None


def test_no_images(heldout: Part) -> None:
    found = seen(flickering(), None, (FLICKERING,))
    assert (found.images, found.flicker, found.accuracy) == (0, None, None)
    assert [block.peak for block in found.live] == [None] * 5


def test_accuracy_before_and_after_a_live_block_goes(heldout: Part) -> None:
    checkpoint = flickering()
    gated = checkpoint.build_gated()
    before = answers(gated, checkpoint, heldout.images).argmax(1)
    # With labels that the full network gets all right, a removal can only cost.
    found = seen(checkpoint, ImageSet(heldout.images, before), (FLICKERING,))
    after = answers(compact(gated, [FLICKERING]), checkpoint, heldout.images).argmax(1)
    assert found.accuracy is not None
    assert found.accuracy["before"] == 1
    assert found.accuracy["after"] == pytest.approx((after == before).double().mean().item())
    assert found.accuracy["samples"] == len(heldout)


def test_gates_are_left_as_they_were(heldout: Part) -> None:
    checkpoint = flickering()
    gated = checkpoint.build_gated().eval()
    look(checkpoint, gated, gated, normalize(checkpoint), heldout)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in gated.modules())
    assert int(rewriting.gates(gated)[FLICKERING].steps) == 0


@pytest.mark.parametrize(
    ("share", "expected"), [(1.0, ()), (0.15, (FLICKERING,)), (0.151, ()), (0.001, (FLICKERING,))]
)
def test_the_share_of_closed_steps(share: float, expected: tuple[str, ...]) -> None:
    assert blocks_beyond(flickering(), share) == expected


def test_at_1_the_deaths_alone_count() -> None:
    """A gate that was closed on every step of the last epoch may open in the next."""
    assert blocks_beyond(flickering(closed=20), 1.0) == ()
    assert blocks_beyond(flickering(closed=20), 0.999) == (FLICKERING,)


def test_further_blocks_by_name() -> None:
    found = blocks_beyond(flickering(), 0.15, ["stages.2.1", "stages.0.0", *DEAD])
    assert found == ("stages.0.0", FLICKERING, "stages.2.1"), "in the order of computation"
    with pytest.raises(GraphError, match=r"no gated block named stages\.7\.0"):
        blocks_beyond(flickering(), 1.0, ["stages.7.0"])
