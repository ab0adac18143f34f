"""Parameters and FLOPs against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

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


def test_network_is_left_as_it_was() -> None:
    model = SPEC.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost(model, (1, 8, 8))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
