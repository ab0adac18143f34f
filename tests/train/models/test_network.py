"""A network as data: written, read, built again, and refused when it does not fit its tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eps_core.errors import ConfigError, EpsError, FileFormatError, GraphError
from eps_train.gating import rewriting
from eps_train.models.spec import NetworkSpec

SPEC = NetworkSpec.parse("cifar:14x4", in_channels=1, classes=3)


def images() -> Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_parse_gates_every_block() -> None:
    assert SPEC.arguments == {"depth": 14, "width": 4, "in_channels": 1, "classes": 3}
    assert SPEC.gated == tuple(f"stages.{s}.{b}" for s in range(3) for b in range(2))
    assert SPEC.all_blocks() == SPEC.gated
    assert NetworkSpec.parse("cifar:14", in_channels=3, classes=10).arguments["width"] == 16


@pytest.mark.parametrize(
    "text",
    ["", "cifar", "cifar:", "cifar:x4", "cifar:abc", "cifar:14xwide", "vgg:16", "cifar:-8", "14"],
)
def test_what_is_no_model_shows_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--model .*: not a model; write cifar:DEPTH"):
        NetworkSpec.parse(text, in_channels=1, classes=3)


@pytest.mark.parametrize("text", ["imagenet:", "imagenet:x", "torchvision:", "a.b:c.d", "a-b:c"])
def test_what_is_no_model_of_the_other_kinds(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--model .*: not a model; write .* imagenet:DEPTH"):
        NetworkSpec.parse(text, in_channels=1, classes=3)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("imagenet:20", "one of 18, 34"),
        ("cifar:15", "try 14"),
        ("cifar:2", "try 8"),
        ("cifar:14x0", "at least 1"),
    ],
)
def test_impossible_models_say_what_is_possible(text: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"^--model {text}: .*{remedy}"):
        NetworkSpec.parse(text, in_channels=1, classes=3)


def test_round_trip_through_plain_data() -> None:
    spec = replace(SPEC, gated=SPEC.gated[1:], removed=("stages.1.0",))
    assert NetworkSpec.from_dict(spec.to_dict()) == spec
    assert isinstance(spec.to_dict()["gated"], list)


def test_built_from_its_state_it_answers_the_same() -> None:
    model = SPEC.build()
    model(images())  # batch norms that have seen something
    again = SPEC.build(model.state_dict())
    assert again.training
    assert torch.equal(model.eval()(images()), again.eval()(images()))
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_networks_built_from_one_state_do_not_share_it() -> None:
    state = SPEC.build().state_dict()
    one, other = SPEC.build(state), SPEC.build(state)
    with torch.no_grad():
        for tensor in one.state_dict().values():
            tensor.zero_()
    assert any(tensor.any() for tensor in other.state_dict().values())
    assert any(tensor.any() for tensor in state.values())


def test_only_gated_blocks_carry_gates() -> None:
    spec = replace(SPEC, gated=("stages.2.1",), removed=("stages.0.1", "stages.1.0"))
    model = spec.build()
    assert list(rewriting.gates(model)) == ["stages.2.1"]
    assert not any(name.startswith("stages.1.0") for name in model.state_dict())


def test_plain_and_gated_networks_start_from_the_same_weights() -> None:
    torch.manual_seed(3)
    gated = SPEC.build().state_dict()
    torch.manual_seed(3)
    plain = replace(SPEC, gated=()).build().state_dict()
    assert all(torch.equal(tensor, gated[name]) for name, tensor in plain.items())


def test_state_may_hold_more_than_the_network_needs() -> None:
    state = SPEC.build().state_dict()
    small = replace(SPEC, gated=(), removed=SPEC.gated[2:]).build(state)
    assert set(small.state_dict()) < set(state)


def test_missing_tensors_are_named() -> None:
    state = SPEC.build().state_dict()
    del state["stages.1.0.conv1.weight"], state["stages.1.0.conv2.weight"]
    with pytest.raises(FileFormatError, match=r"missing, the first is stages\.1\.0\.conv1\.weight"):
        SPEC.build(state)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 5), torch.zeros(3, 16, dtype=torch.float64)])
def test_tensors_of_another_shape_or_type_are_named(wrong: Tensor) -> None:
    state = SPEC.build().state_dict()
    assert state["classifier.weight"].shape == (3, 16)
    with pytest.raises(
        FileFormatError, match=r"tensor classifier\.weight has another shape or type"
    ):
        SPEC.build({**state, "classifier.weight": wrong})


@pytest.mark.parametrize(
    "change",
    [
        {"family": "vgg"},
        {"arguments": {"depth": 14, "dropout": 0.5}},
        {"arguments": {"depth": 15}},
        {"arguments": {"depth": "14"}},
        {"arguments": {}},
    ],
)
@pytest.mark.parametrize("with_state", [True, False])
def test_unknown_networks_are_refused(change: dict[str, Any], with_state: bool) -> None:
    spec = replace(SPEC, **change)
    with pytest.raises(FileFormatError, match=r"^unknown network"):
        spec.build(SPEC.build().state_dict() if with_state else None)


def test_unknown_removed_block_is_refused() -> None:
    with pytest.raises(EpsError, match=r"stages\.7\.7"):
        replace(SPEC, removed=("stages.7.7",)).build()


# -- other families and factories ------------------------------------------------------------------


def test_the_imagenet_family() -> None:
    spec = NetworkSpec.parse("imagenet:18x4", in_channels=1, classes=3)
    assert spec.arguments == {"depth": 18, "width": 4, "in_channels": 1, "classes": 3}
    assert spec.gated == tuple(f"stages.{s}.{b}" for s in range(4) for b in range(2))
    assert NetworkSpec.parse("imagenet:50", in_channels=3, classes=10).arguments["width"] == 64


def comes_back(spec: NetworkSpec, x: Tensor) -> None:
    """Whole, without some blocks, and plain: what is built from data answers as the original."""
    spec = NetworkSpec.from_dict(spec.to_dict())
    torch.manual_seed(0)
    model = spec.build()
    model(x)  # batch norms that have seen something
    model.eval()
    random = torch.get_rng_state()
    again = spec.build(model.state_dict())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(again.eval()(x), model(x))
    assert spec.all_blocks() == spec.gated == tuple(rewriting.gates(again))
    dead = spec.gated[-1:]
    gates = rewriting.gates(model)
    for block in dead:
        gates[block].latch()
    small = replace(spec, gated=(), removed=dead).build(model.state_dict()).eval()
    assert not rewriting.gates(small)
    assert torch.equal(small(x), model(x))


@pytest.mark.usefixtures("timm_models")
@pytest.mark.parametrize("text", ["torchvision:resnet18", "timm:resnet26d"])
def test_networks_of_the_libraries_come_back_from_data(text: str) -> None:
    spec = NetworkSpec.parse(text, in_channels=3, classes=5)
    assert spec.family == text
    assert len(spec.gated) == 8
    comes_back(spec, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("member", ["Net", "keywords", "counting"])
def test_networks_of_ones_own_come_back_from_data(own: str, member: str) -> None:
    spec = NetworkSpec.parse(f"{own}:{member}", in_channels=1, classes=5)
    assert spec.gated == ("gate", "gate2")
    comes_back(spec, torch.randn(2, 1, 8, 8))


@pytest.mark.usefixtures("timm_models")
@pytest.mark.parametrize("text", ["torchvision:resnet18", "timm:resnet26d"])
def test_grey_images_into_a_network_for_colour(text: str) -> None:
    grey = NetworkSpec.parse(text, in_channels=1, classes=5)
    assert grey.arguments == {"num_classes": 5, "in_chans": 1}
    comes_back(grey, torch.randn(2, 1, 64, 64))


def test_a_network_without_residual_additions(own: str) -> None:
    with pytest.raises(GraphError, match=r"^--model somebodys:plain: Sequential: has no residual"):
        NetworkSpec.parse(f"{own}:plain", in_channels=1, classes=5)


@pytest.mark.parametrize(
    ("member", "reason"),
    [("ten", "returns 10 logits, the data has 5"), ("broken", "failed with RuntimeError")],
)
def test_factories_that_do_not_fit(own: str, member: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--model {own}:{member}: {reason}"):
        NetworkSpec.parse(f"{own}:{member}", in_channels=1, classes=5)


def test_a_file_whose_factory_is_not_here() -> None:
    spec = NetworkSpec(family="nowhere.at.all:net", arguments={"num_classes": 5})
    with pytest.raises(FileFormatError, match=r"^unknown network .* set PYTHONPATH"):
        spec.build({})
