"""Parameters and FLOPs against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from eps_train.models.spec import Cost, NetworkSpec, cost

SPEC = NetworkSpec.parse("cifar:8x4", in_channels=1, classes=10)


def convolution(inputs: int, outputs: int, pixels: int) -> int:
    return 2 * 9 * inputs * outputs * pixels  # a multiply-add is two


def test_linear_and_convolution() -> None:
    assert cost(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 2, 2)) == Cost(65, 120)
    layer = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    assert cost(layer, (3, 9, 7)) == Cost(3 * 8 * 9, convolution(3, 8, 5 * 4))


def test_depth_8_by_hand() -> None:
    flops = (
        convolution(1, 4, 64)
        + 2 * convolution(4, 4, 64)
        + convolution(4, 8, 16)
        + convolution(8, 8, 16)
        + convolution(8, 16, 4)
        + convolution(16, 16, 4)
        + 2 * 16 * 10
    )
    assert cost(SPEC.build(), (1, 8, 8)).flops == flops


def test_gates_cost_nothing_and_removed_blocks_no_more() -> None:
    gated = cost(SPEC.build(), (1, 8, 8))
    plain = cost(replace(SPEC, gated=()).build(), (1, 8, 8))
    shorter = cost(replace(SPEC, gated=(), removed=("stages.2.0",)).build(), (1, 8, 8))
    assert gated == plain
    assert gated.flops - shorter.flops == convolution(8, 16, 4) + convolution(16, 16, 4)
    assert gated.parameters - shorter.parameters == 2 * 8 + 9 * 8 * 16 + 2 * 16 + 9 * 16 * 16


@pytest.mark.parametrize(
    "name", ["torchvision:resnet18", "torchvision:vit_b_32", "timm:convnext_atto", "timm:resnet26d"]
)
def test_as_torch_counts(name: str) -> None:
    """With convolutions of every kind, and with the products of an attention."""
    shape = (3, 224, 224)
    model = NetworkSpec.parse(name, in_channels=3, classes=10).skeleton().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty((1, *shape), device="meta"))
    assert cost(model, shape).flops == counter.get_total_flops() > 0


def test_network_is_left_as_it_was() -> None:
    model = SPEC.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost(model, (1, 8, 8))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
