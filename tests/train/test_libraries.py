"""Gates in the networks of torchvision and timm: as many as counted by hand, and no harm done."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, fx, nn

from eps_train.gating import rewriting
from eps_train.gating.tracing import ByMode
from eps_train.models.registry import make

# Blocks of each stage, from the papers; all of them have a shortcut.
FOUR_STAGES = {
    "torchvision:resnet18": (2, 2, 2, 2),
    "torchvision:resnet50": (3, 4, 6, 3),
    "torchvision:wide_resnet50_2": (3, 4, 6, 3),
    "torchvision:resnext50_32x4d": (3, 4, 6, 3),
    "torchvision:regnet_y_400mf": (1, 3, 6, 6),
    "torchvision:convnext_tiny": (3, 3, 9, 3),
    "timm:resnetv2_50": (3, 4, 6, 3),
    "timm:resnet26d": (2, 2, 2, 2),
}
# Here the first block of each group changes the shape and has no shortcut.
INVERTED = {
    "torchvision:mobilenet_v2": (1, 2, 3, 4, 3, 3, 1),
    "torchvision:efficientnet_b0": (1, 2, 2, 3, 3, 4, 1),
}
COUNTS = {name: sum(stages) for name, stages in FOUR_STAGES.items()} | {
    name: sum(count - 1 for count in groups) for name, groups in INVERTED.items()
}
QUICK = ("torchvision:resnet18", "torchvision:mobilenet_v2", "timm:resnet26d")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in COUNTS]

pytestmark = pytest.mark.usefixtures("timm_models")


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    channels = {"in_chans": 3} if name.startswith("timm") else {}
    model = make(name, {"num_classes": 10, **channels})
    for module in model.modules():
        # Zero-initialised last norms would make every branch silent.
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return model


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def answer(model: nn.Module) -> Tensor:
    torch.manual_seed(7)  # dropout and stochastic depth draw the same
    logits: Tensor = model(images())
    return logits


def test_the_counts_that_the_design_names() -> None:
    assert [COUNTS[f"torchvision:{name}"] for name in ("resnet18", "resnet50")] == [8, 16]
    assert COUNTS["torchvision:mobilenet_v2"] == 10
    assert COUNTS["torchvision:convnext_tiny"] == 18
    assert COUNTS["torchvision:efficientnet_b0"] == 9


@pytest.mark.parametrize("name", NAMES)
def test_open_gates_change_nothing_in_either_mode(name: str) -> None:
    model = network(name)
    gated = rewriting.insert_gates(copy.deepcopy(model))
    assert len(rewriting.gates(gated)) == COUNTS[name]
    for training in (True, False, True, False):
        assert torch.equal(answer(gated.train(training)), answer(model.train(training))), training
    theirs = model.state_dict()
    ours = {key: value for key, value in gated.state_dict().items() if key in theirs}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert all(int(gate.steps) == 2 for gate in rewriting.gates(gated).values())


def gated_network(name: str) -> fx.GraphModule:
    model = network(name)
    for module in model.modules():
        # A removed branch draws no random numbers, which would shift those of all others.
        if "p" in vars(module):
            vars(module)["p"] = 0.0
    return rewriting.insert_gates(model, epsilon=0.1)


SLOW_REMOVALS = ("torchvision:convnext_tiny", "torchvision:efficientnet_b0", "timm:resnetv2_50")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_REMOVALS)]
)
def test_removal_equals_latched_gates(name: str) -> None:
    model = gated_network(name)
    blocks = list(rewriting.gates(model))
    generator = random.Random(name)
    for dead in (generator.sample(blocks, len(blocks) // 2), blocks[-2:], blocks):
        latched, start = copy.deepcopy(model), copy.deepcopy(model)
        gates = rewriting.gates(latched)
        for block in dead:
            gates[block].latch()
        left = rewriting.remove_blocks(start, dead)
        assert list(rewriting.gates(left)) == [block for block in blocks if block not in dead]
        for _ in range(2):
            expected, found = answer(latched), answer(left)
            assert torch.equal(expected, found)
            expected.square().sum().backward()
            found.square().sum().backward()
        gradients = {key: parameter.grad for key, parameter in latched.named_parameters()}
        for key, parameter in left.named_parameters():
            expected_gradient = gradients[key]
            assert parameter.grad is not None
            assert expected_gradient is not None
            assert torch.equal(parameter.grad, expected_gradient), key
        assert torch.equal(answer(latched.eval()), answer(left.eval()))


def test_names_are_those_of_the_blocks() -> None:
    names = list(rewriting.gates(gated_network("torchvision:resnet18")))
    assert names == [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]


def test_branches_of_blocks_that_change_the_shape() -> None:
    """Both paths carry weights there; the one with more of them is the branch."""
    model = gated_network("torchvision:resnet18")
    left = rewriting.remove_blocks(model, ["layer2.0"])
    kept = [key for key in left.state_dict() if key.startswith("layer2.0.")]
    assert kept
    assert all(key.startswith("layer2.0.downsample.") for key in kept)


def test_two_additions_of_one_module() -> None:
    model = make("timm:vit_tiny_patch16_224", {"num_classes": 10, "in_chans": 3})
    names = list(rewriting.gates(rewriting.insert_gates(model)))
    assert len(names) == 2 * 12
    assert names[:4] == ["blocks.0", "blocks.0:2", "blocks.1", "blocks.1:2"]
    assert {rewriting.stage_name(name) for name in names} == {"blocks"}


def test_dropout_of_a_whole_network_still_listens_to_the_mode() -> None:
    import timm

    model = timm.create_model("resnet18", num_classes=10, drop_rate=0.5)
    gated = rewriting.insert_gates(copy.deepcopy(model))
    assert any(isinstance(module, ByMode) for module in gated.modules())
    for training in (True, False):
        assert torch.equal(answer(gated.train(training)), answer(model.train(training)))
