"""Networks of torchvision, timm and our own: shut any gates, compact, and the logits stay equal."""

from __future__ import annotations

import importlib.util
import random
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

import eps_compact
import eps_train
from eps_compact import compact
from eps_train.gating import rewriting
from eps_train.gating.gate import EpsilonGate
from eps_train.gating.rewriting import branch_parameters
from eps_train.models.resnets import Tap
from eps_train.models.spec import NetworkSpec
from tests.train.test_libraries import COUNTS

# Blocks counted by hand: depth 6n + 2 has 3n, and ResNet-50 has 3, 4, 6 and 3.
OURS = {"cifar:20x4": 9, "imagenet:50x8": 16}
BLOCKS = {**OURS, **COUNTS}
QUICK = ("cifar:20x4", "torchvision:resnet18", "torchvision:mobilenet_v2", "timm:resnet26d")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BLOCKS]


def require(name: str) -> None:
    package = name.partition(":")[0]
    if package in ("torchvision", "timm") and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")


@cache
def spec(name: str) -> NetworkSpec:
    return NetworkSpec.parse(name, in_channels=3, classes=10)


def gated(name: str) -> fx.GraphModule:
    """With every branch and every running statistic of some size."""
    require(name)
    torch.manual_seed(0)
    model = spec(name).build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.0)
            assert module.running_mean is not None
            nn.init.normal_(module.running_mean, std=0.1)
        elif isinstance(scale := getattr(module, "layer_scale", None), nn.Parameter):
            nn.init.constant_(scale, 0.5)
    return model


@cache
def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def dead_sets(name: str) -> dict[str, list[str]]:
    blocks = list(spec(name).gated)
    generator = random.Random(name)
    return {
        "none": [],
        "some": generator.sample(blocks, len(blocks) // 4 + 1),
        "most": generator.sample(blocks, 3 * len(blocks) // 4),
        "first": blocks[:1],
        "all": blocks,
    }


@torch.no_grad()
def equal(one: nn.Module, other: nn.Module, counts: tuple[int, ...] = (1, 3)) -> bool:
    return all(torch.equal(one(images(count)), other(images(count))) for count in counts)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_the_gated_network(name: str) -> None:
    model = gated(name)
    gates = rewriting.gates(model)
    assert len(gates) == BLOCKS[name]
    worth = branch_parameters(model)
    whole = sum(parameter.numel() for parameter in model.parameters())
    distinct = set()
    for kind, dead in dead_sets(name).items():
        for block, gate in gates.items():
            gate.dead.fill_(block in dead)
        plain = compact(model.train())
        model.eval()
        assert equal(plain, model), kind
        distinct.add(tuple(plain(images(1)).flatten().tolist()))
        left = sum(parameter.numel() for parameter in plain.parameters())
        assert left == whole - sum(worth[block] for block in dead), kind
        assert not any(isinstance(module, (EpsilonGate, Tap)) for module in plain.modules())
    assert len(distinct) == 5, "no branch is silent"


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_built_again_from_its_name_and_its_tensors(name: str) -> None:
    model = gated(name)
    dead = dead_sets(name)["most"]
    plain = compact(model, dead=dead)
    original = spec(name)
    smaller = NetworkSpec(
        family=original.family, arguments=original.arguments, removed=tuple(reversed(dead))
    )
    state = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    again = rewriting.drop_taps(smaller.build(state)).eval()
    assert again.state_dict().keys() == state.keys()
    assert equal(again, plain, (2,))


class Mine(nn.Module):
    """The user's own network of docs/compaction.md."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.two = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.one(x)
        x = x + self.two(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_a_network_of_your_own() -> None:
    model = eps_train.insert_gates(Mine(), epsilon=0.5)
    assert list(rewriting.gates(model)) == ["gate", "gate2"]
    plain = eps_compact.compact(model, dead=["gate2"])
    rewriting.gates(model)["gate2"].latch()
    assert equal(plain, model.eval())
    assert list(dict(plain.named_children())) == ["stem", "one", "head"]
    assert equal(eps_compact.compact(model), plain), "a latched gate need not be named"


@pytest.mark.parametrize("name", QUICK)
def test_twice_and_in_any_order(name: str) -> None:
    model = gated(name)
    dead = dead_sets(name)["some"]
    one, other = compact(model, dead=dead), compact(model, dead=list(reversed(dead)))
    twice = compact(one)
    assert one.code == other.code == twice.code
    assert list(one.state_dict()) == list(other.state_dict()) == list(twice.state_dict())
    assert equal(one, twice, (2,))
