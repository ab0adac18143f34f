"""The CIFAR family: sizes derived by hand, shapes for odd images, shortcuts against a naive one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from eps_train.gating import rewriting
from eps_train.gating.gate import EpsilonGate
from eps_train.models.resnets import BasicBlock, CifarResNet, Downsample, Normalize, SideHead, Tap


def count_by_hand(n: int, width: int, in_channels: int, classes: int) -> int:
    """Parameters of depth 6n + 2, layer by layer; a norm has a weight and a bias a channel."""
    total = 9 * in_channels * width + 2 * width  # stem: 3x3 convolution without bias, norm
    channels = width
    for stage, out in enumerate((width, 2 * width, 4 * width)):
        for block in range(n):
            if not (stage == 0 and block == 0):  # the very first block has no norm of its own
                total += 2 * channels
            total += 9 * channels * out + 2 * out + 9 * out * out
            channels = out
    return total + 2 * channels + channels * classes + classes  # last norm, linear layer


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_depth_110_has_as_many_parameters_as_by_hand() -> None:
    assert count_by_hand(18, 16, 3, 10) == 1_727_962
    with torch.device("meta"):
        assert parameters(CifarResNet(depth=110)) == 1_727_962


@pytest.mark.parametrize(
    ("n", "width", "in_channels", "classes"), [(1, 1, 1, 2), (2, 5, 4, 7), (9, 16, 1, 10)]
)
def test_parameters_of_other_sizes(n: int, width: int, in_channels: int, classes: int) -> None:
    with torch.device("meta"):
        model = CifarResNet(depth=6 * n + 2, width=width, in_channels=in_channels, classes=classes)
    assert parameters(model) == count_by_hand(n, width, in_channels, classes)


def test_gates_and_shortcuts_hold_no_parameters() -> None:
    model = CifarResNet(depth=8, width=4)
    for module in model.modules():
        if isinstance(module, (EpsilonGate, Downsample, Tap)):
            assert not list(module.parameters())


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (13, 9), (15, 8), (32, 32), (33, 47)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    model = CifarResNet(depth=8, width=3, in_channels=2, classes=5)
    shapes: dict[str, torch.Size] = {}
    for name, gate in rewriting.gates(model).items():
        gate.register_forward_hook(lambda m, a, out, name=name: shapes.update({name: out.shape}))
    logits = model(torch.randn(2, 2, *size))
    logits.sum().backward()
    half = [math.ceil(side / 2) for side in size]
    quarter = [math.ceil(side / 2) for side in half]
    assert logits.shape == (2, 5)
    assert shapes == {
        "stages.0.0": (2, 3, *size),
        "stages.1.0": (2, 6, *half),
        "stages.2.0": (2, 12, *quarter),
    }


def naive_downsample(x: Tensor, out_channels: int) -> Tensor:
    """Window by window: the mean of the pixels that exist, between channels of zeros."""
    count, channels, height, width = x.shape
    result = torch.zeros(count, out_channels, math.ceil(height / 2), math.ceil(width / 2))
    first = (out_channels - channels) // 2
    for row in range(result.shape[2]):
        for column in range(result.shape[3]):
            window = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            result[:, first : first + channels, row, column] = window.mean(dim=(2, 3))
    return result


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (9, 6), (7, 10), (1, 1)])
@pytest.mark.parametrize("out_channels", [6, 8])
def test_shortcut_across_a_change_of_shape(size: tuple[int, int], out_channels: int) -> None:
    x = torch.randn(2, 3, *size)
    found = Downsample(3, out_channels)(x)
    torch.testing.assert_close(found, naive_downsample(x, out_channels), rtol=0, atol=1e-6)


def test_shortcut_fits_the_branch_it_is_added_to() -> None:
    block = BasicBlock(3, 6, stride=2)
    for size in ((8, 8), (9, 9), (11, 5)):
        assert block(torch.randn(1, 3, *size)).shape[2:] == tuple(math.ceil(s / 2) for s in size)


def test_a_block_is_its_layers_in_the_order_of_the_paper() -> None:
    block = BasicBlock(4, 4).eval()
    x = torch.randn(2, 4, 6, 6)
    branch = block.conv2(block.bn2(block.conv1(block.bn1(x).relu())).relu())
    assert torch.equal(block(x), x + branch)
    first = BasicBlock(4, 4, preactivated=True).eval()
    branch = first.conv2(first.bn2(first.conv1(x)).relu())
    assert torch.equal(first(x), x + branch)


@pytest.mark.parametrize(("n", "block"), [(1, 0), (2, 1), (3, 1), (9, 4)])
def test_side_head_looks_behind_the_middle_block_of_stage_two(n: int, block: int) -> None:
    with torch.device("meta"):
        model = CifarResNet(depth=6 * n + 2, width=2)
    nodes = rewriting.trace(model).graph.nodes
    (tap,) = (node for node in nodes if node.target == "side_tap")
    assert str(tap.args[0]) == f"stages_1_{block}_gate"
    assert [found.channels for found in rewriting.taps(model)] == [4]


def test_side_head_maps_activations_to_logits() -> None:
    assert SideHead(4, 7)(torch.randn(3, 4, 5, 6)).shape == (3, 7)


@pytest.mark.parametrize(
    ("depth", "nearest"), [(9, 8), (2, 8), (0, 8), (-4, 8), (12, 14), (112, 110), (114, 116)]
)
def test_impossible_depths_name_a_possible_one(depth: int, nearest: int) -> None:
    with pytest.raises(ValueError, match=rf"6n \+ 2 .* not {depth}; try {nearest}$"):
        CifarResNet(depth=depth)


@pytest.mark.parametrize("argument", ["width", "in_channels", "classes"])
def test_impossible_sizes(argument: str) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        CifarResNet(**{"depth": 8, argument: 0})


def test_he_initialisation_by_fan_out() -> None:
    torch.manual_seed(0)
    model = CifarResNet(depth=14, width=16)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = 9 * module.out_channels
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.08), (
                name
            )
    assert not model.classifier.bias.any()


def test_normalize_is_in_pixel_units() -> None:
    images = torch.randint(0, 256, (4, 2, 3, 3), dtype=torch.uint8)
    found = Normalize([100.0, 20.0], [50.0, 4.0])(images)
    expected = images.double()
    expected[:, 0] = (expected[:, 0] - 100) / 50
    expected[:, 1] = (expected[:, 1] - 20) / 4
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
