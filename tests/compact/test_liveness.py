"""What is measured of the blocks that stay, against a plain recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from eps_compact.evidence import BlockEvidence, Response, live_blocks, liveness, observe
from eps_core.errors import TrainingError
from eps_train.data.images import ImageSet
from eps_train.gating import rewriting
from eps_train.models.cifar import Normalize
from eps_train.training.checkpoint import Checkpoint
from tests.checkpoints import EPSILON, make_checkpoint

DEAD = ("stages.1.0", "stages.2.1")


def uint8_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 1, 8, 8), generator=generator).to(torch.uint8)


def normalize(checkpoint: Checkpoint) -> nn.Module:
    return Normalize.of(checkpoint.data)


def responses(
    model: nn.Module, normalize: nn.Module, images: Tensor, blocks: list[str]
) -> dict[str, Response]:
    return observe(model, normalize, images, blocks).responses


def measure(checkpoint: Checkpoint, model: nn.Module, images: Tensor) -> tuple[BlockEvidence, ...]:
    blocks = list(live_blocks(checkpoint))
    return liveness(checkpoint, responses(model, normalize(checkpoint), images, blocks))


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
        torch.testing.assert_close(response.per_sample, expected, rtol=1e-4, atol=1e-5)
        assert response.peak == float(response.per_sample.max())


def test_quiet_is_the_share_of_samples_under_epsilon() -> None:
    checkpoint = make_checkpoint()
    model, images = checkpoint.build_gated(), uint8_images(50)
    per_sample = responses(model, normalize(checkpoint), images, ["stages.1.1"])
    ranked = per_sample["stages.1.1"].per_sample.sort().values
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


@pytest.mark.parametrize("run", [{}, {"epsilon": None}], ids=["unknown", "led"])
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


def test_the_answers_of_the_same_pass() -> None:
    checkpoint = make_checkpoint(dead=DEAD)
    images = uint8_images(20)
    found = observe(checkpoint.build_gated(), normalize(checkpoint), images, ["stages.0.0"])
    expected = checkpoint.build_gated().eval()(normalize(checkpoint)(images))
    torch.testing.assert_close(found.answers, expected.detach())


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
    found = observe(model, normalize(checkpoint), part, ["stages.0.0"]).responses["stages.0.0"]
    expected = responses(model, normalize(checkpoint), images, ["stages.0.0"])["stages.0.0"]
    assert torch.equal(found.per_sample, expected.per_sample)


def test_without_images_the_record_is_all_there_is() -> None:
    checkpoint = with_record(make_checkpoint(dead=DEAD), "stages.0.2", closed_steps=5)
    found = {block.block: block for block in liveness(checkpoint, None)}
    assert found.keys() == set(live_blocks(checkpoint))
    block = found["stages.0.2"]
    assert (block.peak, block.quiet, block.ratio, block.samples) == (None, None, None, 0)
    assert block.closed == 5 / 20
