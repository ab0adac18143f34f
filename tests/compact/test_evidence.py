"""Evidence about live blocks, against a plain recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from eps_compact.certificate import (
    ActivationStatistics,
    BlockEvidence,
    block_evidence,
    blocks_beyond,
    measure_activations,
    observe,
)
from eps_compact.compaction import compact
from eps_core.errors import GraphError, TrainingError
from eps_train.data import dataset
from eps_train.data.images import ImageSet, Part
from eps_train.gating import rewriting
from eps_train.models.resnets import Normalize
from eps_train.training.checkpoint import Checkpoint
from tests.checkpoints import EPSILON, make_checkpoint

DEAD = ("stages.1.0", "stages.2.1")


def uint8_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 1, 8, 8), generator=generator).to(torch.uint8)


def normalize(checkpoint: Checkpoint) -> Normalize:
    return Normalize.of(checkpoint.data)


def responses(
    model: nn.Module, normalize: nn.Module, images: Tensor, blocks: list[str]
) -> dict[str, Tensor]:
    return observe(model, normalize, images, blocks)[1]


def measure(checkpoint: Checkpoint, model: nn.Module, images: Tensor) -> tuple[BlockEvidence, ...]:
    found = responses(model, normalize(checkpoint), images, live_blocks(checkpoint))
    return block_evidence(checkpoint, found)


def live_blocks(checkpoint: Checkpoint) -> list[str]:
    return [record.block for record in checkpoint.gates if record.death is None]


def with_record(checkpoint: Checkpoint, block: str, **changes: float) -> Checkpoint:
    gates = [
        replace(record, **changes) if record.block == block else record  # type: ignore[arg-type]
        for record in checkpoint.gates
    ]
    return replace(checkpoint, gates=gates)


def test_live_blocks_in_order_with_their_last_epoch() -> None:
    checkpoint = with_record(make_checkpoint(dead=DEAD), "stages.0.2", closed_steps=5)
    found = measure(checkpoint, checkpoint.build_gated(), uint8_images(300))
    assert [block.block for block in found] == [
        record.block for record in checkpoint.gates if record.block not in DEAD
    ]
    assert all(block.samples == 300 and block.epsilon == EPSILON for block in found)
    seen = responses(
        checkpoint.build_gated(), normalize(checkpoint), uint8_images(300), live_blocks(checkpoint)
    )
    assert {block.block: block.peak for block in found} == {
        block: float(response.max()) for block, response in seen.items()
    }
    closed = {block.block: block.closed for block in found}
    assert closed["stages.0.2"] == 5 / 20
    assert closed["stages.0.0"] == 3 / 20


def test_peaks_are_those_of_the_network_that_ships() -> None:
    """300 images make two batches; dead gates are shut, all others open, whatever the mode was."""
    checkpoint = make_checkpoint(dead=DEAD)
    model = checkpoint.build_gated().train()
    images = uint8_images(300)
    found = responses(model, normalize(checkpoint), images, ["stages.0.0", "stages.2.2"])
    assert model.training
    assert int(rewriting.gates(model)["stages.0.0"].steps) == 0, "no gate judged anything"

    open_model = checkpoint.build_gated().eval()
    branches: dict[str, Tensor] = {}
    for block in found:
        open_model.get_submodule(f"{block}.conv2").register_forward_hook(
            lambda module, args, out, block=block: branches.update({block: out})
        )
    with torch.no_grad():
        open_model(normalize(checkpoint)(images))
    for block, response in found.items():
        expected = branches[block].abs().amax(dim=(1, 2, 3))
        torch.testing.assert_close(response, expected, rtol=1e-4, atol=1e-5)


def test_relative_responses_are_those_of_each_image() -> None:
    checkpoint, images, block = make_checkpoint(), uint8_images(20), "stages.1.1"
    plain = responses(checkpoint.build_gated(), normalize(checkpoint), images, [block])[block]
    checkpoint.config["relative_epsilon"] = True
    model = checkpoint.build_gated()
    inputs: list[Tensor] = []
    rewriting.gates(model)[block].register_forward_hook(
        lambda gate, operands, out: inputs.append(operands[0])
    )
    found = responses(model, normalize(checkpoint), images, [block])[block]
    rms = torch.cat(inputs).square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(found, plain / rms)


def test_quiet_is_the_share_of_samples_under_epsilon() -> None:
    checkpoint = make_checkpoint()
    model, images = checkpoint.build_gated(), uint8_images(50)
    per_sample = responses(model, normalize(checkpoint), images, ["stages.1.1"])
    ranked = per_sample["stages.1.1"].sort().values
    checkpoint = with_record(checkpoint, "stages.1.1", epsilon=float(ranked[19]))  # itself closed
    found = {b.block: b for b in measure(checkpoint, model, images)}
    assert found["stages.1.1"].quiet == pytest.approx(20 / 50)
    assert found["stages.1.1"].ratio == pytest.approx(float(ranked[-1] / ranked[19]))


def test_gates_held_open_are_measured_by_the_epsilon_of_the_run() -> None:
    checkpoint = with_record(make_checkpoint(), "stages.0.0", epsilon=0.0, closed_steps=0)
    checkpoint.config["epsilon"] = 4.0
    model = checkpoint.build_gated()
    first = measure(checkpoint, model, uint8_images(8))[0]
    assert (first.block, first.epsilon, first.closed) == ("stages.0.0", 4.0, None)
    assert first.peak is not None
    assert first.ratio == pytest.approx(first.peak / 4)


@pytest.mark.parametrize("run", [{}, {"epsilon": None}], ids=["unknown", "pruned to a target"])
def test_no_epsilon_at_all(run: dict[str, None]) -> None:
    checkpoint = with_record(make_checkpoint(), "stages.0.0", epsilon=0.0, closed_steps=0)
    checkpoint.config = dict(run)
    model = checkpoint.build_gated()
    first = measure(checkpoint, model, uint8_images(8))[0]
    assert (first.epsilon, first.ratio, first.quiet) == (0.0, None, 0.0)
    assert first.peak is not None
    assert first.peak > 0


def test_hooks_are_gone_afterwards() -> None:
    checkpoint = make_checkpoint()
    model = checkpoint.build_gated()
    measure(checkpoint, model, uint8_images(4))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nothing_to_measure() -> None:
    plain = make_checkpoint(gated=False)
    assert measure(plain, plain.build_gated(), uint8_images(4)) == ()


def test_a_response_that_is_not_finite_is_named() -> None:
    checkpoint = make_checkpoint(dead=DEAD)
    checkpoint.state["stages.2.2.conv2.weight"][0, 0, 0, 0] = float("nan")
    model = checkpoint.build_gated()
    with pytest.raises(TrainingError, match=r"^block stages\.2\.2: its response .* not finite"):
        measure(checkpoint, model, uint8_images(4))


def test_the_logits_of_the_same_pass() -> None:
    checkpoint = make_checkpoint(dead=DEAD)
    images = uint8_images(20)
    logits, _ = observe(checkpoint.build_gated(), normalize(checkpoint), images, ["stages.0.0"])
    expected = checkpoint.build_gated().eval()(normalize(checkpoint)(images))
    torch.testing.assert_close(logits, expected.detach())


def test_a_part_on_disk_is_measured_as_one_in_memory() -> None:
    """Of a part only `batches` is used: all its images at once might not fit."""
    checkpoint = make_checkpoint(dead=DEAD)
    images = uint8_images(300)

    class OnDisk(ImageSet):
        @property
        def images(self) -> Tensor:
            raise AssertionError("all images at once")

        def to(self, device: torch.device) -> OnDisk:
            return self

        def batches(self, size: int) -> Iterator[ImageSet]:
            return ImageSet(images, torch.zeros(300, dtype=torch.int64)).batches(size)

    part = OnDisk.__new__(OnDisk)
    model = checkpoint.build_gated()
    _, found = observe(model, normalize(checkpoint), part, ["stages.0.0"])
    expected = responses(model, normalize(checkpoint), images, ["stages.0.0"])
    assert torch.equal(found["stages.0.0"], expected["stages.0.0"])


def test_without_images_the_record_is_all_there_is() -> None:
    checkpoint = with_record(make_checkpoint(dead=DEAD), "stages.0.2", closed_steps=5)
    found = {block.block: block for block in block_evidence(checkpoint, None)}
    assert found.keys() == set(live_blocks(checkpoint))
    block = found["stages.0.2"]
    assert (block.peak, block.quiet, block.ratio, block.samples) == (None, None, None, 0)
    assert block.closed == 5 / 20


# -- train/inference gap, and what a removal costs

FIRST_DEAD = ("stages.0.1",)
PARTIAL = "stages.1.1"


@pytest.fixture(scope="module")
def heldout() -> Part:
    return dataset.load("digits").validation


def with_partial(epsilon: float = 2.5, closed: int = 3) -> Checkpoint:
    """Only one gate was closed on steps of the last epoch."""
    checkpoint = make_checkpoint(dead=FIRST_DEAD, depth=14)
    checkpoint.gates = [
        replace(record, epsilon=epsilon, closed_steps=closed)
        if record.block == PARTIAL
        else record
        if record.death
        else replace(record, closed_steps=0)
        for record in checkpoint.gates
    ]
    return checkpoint


def seen(
    checkpoint: Checkpoint, heldout: Tensor | Part | None, beyond: tuple[str, ...] = ()
) -> ActivationStatistics:
    gated, shut = checkpoint.build_gated().eval(), checkpoint.build_gated().eval()
    gates = rewriting.gates(shut)
    for block in beyond:
        gates[block].latch()
    return measure_activations(checkpoint, gated, shut, normalize(checkpoint), heldout, beyond)


def answers(model: nn.Module, checkpoint: Checkpoint, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(normalize(checkpoint)(images))
    return found


def test_a_gate_that_judges_each_image(heldout: Part) -> None:
    """Whole networks with and without the branch give the answers of a gate open and shut."""
    checkpoint = with_partial()
    peaks = {block.block: block for block in seen(checkpoint, heldout).live}[PARTIAL]
    assert peaks.peak is not None
    epsilon = peaks.peak * 0.8
    checkpoint = with_partial(epsilon)
    found = seen(checkpoint, heldout).gap
    assert found is not None
    assert found.blocks == (PARTIAL,)
    assert found.samples == len(heldout)
    gated = checkpoint.build_gated()
    with_branch = answers(gated, checkpoint, heldout.images)
    without = answers(compact(gated, [PARTIAL]), checkpoint, heldout.images)
    quiet = {block.block: block for block in seen(checkpoint, heldout).live}[PARTIAL].quiet
    assert quiet is not None
    assert 0 < quiet < 1, "otherwise nothing is tested"
    assert found.differ == quiet
    branch: list[Tensor] = []
    rewriting.gates(gated)[PARTIAL].register_forward_pre_hook(
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
    assert seen(with_partial(closed=0), heldout).gap is None
    assert seen(with_partial(epsilon=0.0), heldout).gap is None, "it was held open"
    assert seen(with_partial(), heldout, (PARTIAL,)).gap is None, "it is gone"


def test_images_alone_give_no_accuracy(heldout: Part) -> None:
    found = seen(with_partial(), heldout.images).gap
    assert found is not None
    assert found.accuracy is None
    assert seen(with_partial(), heldout.images, (PARTIAL,)).accuracy is None


def test_no_images(heldout: Part) -> None:
    found = seen(with_partial(), None, (PARTIAL,))
    assert (found.images, found.gap, found.accuracy) == (0, None, None)
    assert [block.peak for block in found.live] == [None] * 5


def test_accuracy_before_and_after_a_live_block_goes(heldout: Part) -> None:
    checkpoint = with_partial()
    gated = checkpoint.build_gated()
    before = answers(gated, checkpoint, heldout.images).argmax(1)
    # With labels that the full network gets all right, a removal can only cost.
    found = seen(checkpoint, ImageSet(heldout.images, before), (PARTIAL,))
    after = answers(compact(gated, [PARTIAL]), checkpoint, heldout.images).argmax(1)
    assert found.accuracy is not None
    assert found.accuracy["before"] == 1
    assert found.accuracy["after"] == pytest.approx((after == before).double().mean().item())
    assert found.accuracy["samples"] == len(heldout)


def test_gates_are_left_as_they_were(heldout: Part) -> None:
    checkpoint = with_partial()
    gated = checkpoint.build_gated().eval()
    measure_activations(checkpoint, gated, gated, normalize(checkpoint), heldout)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in gated.modules())
    assert int(rewriting.gates(gated)[PARTIAL].steps) == 0


@pytest.mark.parametrize(
    ("share", "expected"), [(1.0, ()), (0.15, (PARTIAL,)), (0.151, ()), (0.001, (PARTIAL,))]
)
def test_the_share_of_closed_steps(share: float, expected: tuple[str, ...]) -> None:
    assert blocks_beyond(with_partial(), share) == expected


def test_at_1_the_deaths_alone_count() -> None:
    """A gate that was closed on every step of the last epoch may open in the next."""
    assert blocks_beyond(with_partial(closed=20), 1.0) == ()
    assert blocks_beyond(with_partial(closed=20), 0.999) == (PARTIAL,)


def test_further_blocks_by_name() -> None:
    found = blocks_beyond(with_partial(), 0.15, ["stages.2.1", "stages.0.0", *FIRST_DEAD])
    assert found == ("stages.0.0", PARTIAL, "stages.2.1"), "in the order of computation"
    with pytest.raises(GraphError, match=r"no gated block named stages\.7\.0"):
        blocks_beyond(with_partial(), 1.0, ["stages.7.0"])
