"""What a branch costs, against the difference that removing it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx

from eps_compact.analysis.importance import live_network
from eps_train.data.downloads import import_torchvision
from eps_train.gating import rewriting
from eps_train.gating.costs import branch_costs
from eps_train.models.resnets import CifarResNet
from eps_train.models.spec import cost
from tests.checkpoints import make_checkpoint


def basic_blocks() -> fx.GraphModule:
    return rewriting.trace(CifarResNet(depth=20, width=4))


def bottlenecks() -> fx.GraphModule:
    import_torchvision()
    import torchvision

    return rewriting.insert_gates(torchvision.models.resnet50(num_classes=10))


@pytest.mark.parametrize("factory", [basic_blocks, bottlenecks])
def test_costs_are_what_removal_saves(factory: Callable[[], fx.GraphModule]) -> None:
    model = factory()
    shape = (3, 32, 32)
    whole = cost(model, shape)
    found = branch_costs(model, shape)
    assert [c.block for c in found] == list(rewriting.gates(model))
    for branch in found[:: max(1, len(found) // 4)]:
        left = cost(rewriting.remove_blocks(model, [branch.block]), shape)
        assert branch.parameters == whole.parameters - left.parameters
        assert branch.flops == whole.flops - left.flops


def test_activations_are_those_of_the_branch_for_one_image() -> None:
    """A basic block of width 4 on 8x8: BN, ReLU, conv, BN, ReLU, conv, each 4 x 64 numbers of 4
    bytes. The first block has no leading BN and ReLU, and an identity makes nothing."""
    model = rewriting.trace(CifarResNet(depth=8, width=4, in_channels=1))
    first, second, _ = branch_costs(model, (1, 8, 8))
    assert second.block == "stages.1.0"
    assert first.activation_bytes == 4 * 4 * 64 * 4
    # stride 2 and width 8: two steps on the input, four on 8 x 16 numbers
    assert second.activation_bytes == (2 * 4 * 64 + 4 * 8 * 16) * 4


def test_blocks_of_one_kind_have_the_same_layers_on_the_same_shapes() -> None:
    model = rewriting.trace(CifarResNet(depth=20, width=4))
    kinds = [c.kind for c in branch_costs(model, (3, 32, 32))]
    assert kinds[1] == kinds[2]
    assert kinds[4] == kinds[5]
    assert kinds[7] == kinds[8]
    assert len(set(kinds)) == 6


def test_a_live_network_has_lost_its_dead_blocks_alone() -> None:
    checkpoint = make_checkpoint(dead=["stages.1.1", "stages.2.0"])
    model = live_network(checkpoint)
    assert set(rewriting.gates(model)) == set(checkpoint.network.gated) - set(checkpoint.dead)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(model(images), checkpoint.build_gated().eval()(images))


def test_a_plain_network_gets_a_gate_at_every_block() -> None:
    plain = make_checkpoint(gated=False)
    model = live_network(plain)
    assert tuple(rewriting.gates(model)) == plain.network.all_blocks()
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(model(images), plain.network.build(plain.state).eval()(images))


def test_blocks_that_are_out_already_stay_out() -> None:
    plain = make_checkpoint(gated=False)
    plain = replace(plain, network=replace(plain.network, removed=("stages.0.1",)))
    assert "stages.0.1" not in rewriting.gates(live_network(plain))
