from __future__ import annotations

import pytest
import torch
from torch import nn

from eps_train.gating import rewriting
from eps_train.gating.rewriting import branch_parameters
from eps_train.models.spec import NetworkSpec


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def agree_with_removal(model: nn.Module) -> None:
    sizes = branch_parameters(model)
    assert list(sizes) == list(rewriting.gates(model))
    whole = count(model)
    for block, size in sizes.items():
        assert whole - count(rewriting.remove_blocks(model, [block])) == size, block


@pytest.mark.parametrize("model", ["cifar:14x4", "imagenet:18x4", "imagenet:50x4"])
def test_counts_what_a_removal_takes_away(model: str) -> None:
    agree_with_removal(NetworkSpec.parse(model, in_channels=3, classes=10).skeleton())


@pytest.mark.usefixtures("torchvision_models")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_counts_what_a_removal_takes_away_elsewhere(name: str) -> None:
    spec = NetworkSpec.parse(f"torchvision:{name}", in_channels=3, classes=10)
    agree_with_removal(spec.skeleton())


class Shared(nn.Module):
    """Two branches through one convolution, each with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.conv(x) * self.scale
        y: torch.Tensor = x + self.conv(x)
        return y


def test_what_two_blocks_share_leaves_with_neither() -> None:
    assert list(branch_parameters(rewriting.insert_gates(Shared())).values()) == [2, 0]
