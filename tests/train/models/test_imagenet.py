"""The ImageNet family: sizes derived by hand, the pre-activation's three forms, and the tap."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eps_train.gating import rewriting
from eps_train.gating.gate import EpsilonGate
from eps_train.models.resnets import ImageNetResNet, PreactivationBlock

# Blocks a stage, from the paper.
COUNTS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def count_by_hand(depth: int, width: int, in_channels: int, classes: int) -> int:
    """Parameters, layer by layer: a norm has two a channel, a convolution no bias."""
    total = 49 * in_channels * width + 2 * width  # stem: 7x7 convolution, norm
    channels = width
    for stage, count in enumerate(COUNTS[depth]):
        inner = width * 2**stage
        out = inner if depth < 50 else 4 * inner
        for block in range(count):
            if stage or block:
                total += 2 * channels  # leading norm; the very first block has none
            if channels != out:
                total += channels * out  # 1x1 convolution on the shortcut
            if depth < 50:
                total += 9 * channels * inner + 2 * inner + 9 * inner * inner
            else:
                total += channels * inner + 2 * inner  # 1x1, norm
                total += 9 * inner * inner + 2 * inner  # 3x3, norm
                total += inner * out  # 1x1
            channels = out
    return total + 2 * channels + channels * classes + classes  # last norm, linear layer


@pytest.mark.parametrize("depth", COUNTS)
def test_parameters_are_as_many_as_by_hand(depth: int) -> None:
    with torch.device("meta"):
        whole = ImageNetResNet(depth=depth)
        small = ImageNetResNet(depth=depth, width=5, in_channels=2, classes=7)
    assert sum(p.numel() for p in whole.parameters()) == count_by_hand(depth, 64, 3, 1000)
    assert sum(p.numel() for p in small.parameters()) == count_by_hand(depth, 5, 2, 7)


def test_depth_101_in_numbers() -> None:
    """Convolutions of the four stages, then norms and the linear layer, summed up on paper."""
    stem = 49 * 3 * 64
    convolutions = (
        (64 * 64 + 9 * 64**2 + 64 * 256) + 64 * 256 + 2 * (2 * 256 * 64 + 9 * 64**2),
        (256 * 128 + 9 * 128**2 + 128 * 512) + 256 * 512 + 3 * (2 * 512 * 128 + 9 * 128**2),
        (512 * 256 + 9 * 256**2 + 256 * 1024) + 512 * 1024 + 22 * (2 * 1024 * 256 + 9 * 256**2),
        (1024 * 512 + 9 * 512**2 + 512 * 2048) + 1024 * 2048 + 2 * (2 * 2048 * 512 + 9 * 512**2),
    )
    within = 2 * 2 * (3 * 64 + 4 * 128 + 23 * 256 + 3 * 512)  # two norms between convolutions
    leading = 2 * (2 * 256 + 256 + 3 * 512 + 512 + 22 * 1024 + 1024 + 2 * 2048)
    ends = 2 * 64 + 2 * 2048  # of the stem, before the pool
    linear = 2048 * 1000 + 1000
    total = stem + sum(convolutions) + within + leading + ends + linear
    assert total == count_by_hand(101, 64, 3, 1000) == 44_541_480


@pytest.mark.parametrize("depth", [18, 50])
def test_shapes_from_the_image_to_the_logits(depth: int) -> None:
    model = ImageNetResNet(depth=depth, width=4, in_channels=1, classes=5)
    shapes: list[torch.Size] = []
    for gate in rewriting.gates(model).values():
        gate.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    logits = model(torch.randn(2, 1, 64, 96))
    logits.sum().backward()
    assert logits.shape == (2, 5)
    factor = 4 if depth == 50 else 1
    expected = [
        (2, 4 * 2**stage * factor, 16 // 2**stage, 24 // 2**stage)
        for stage, count in enumerate(COUNTS[depth])
        for _ in range(count)
    ]
    assert shapes == expected
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("depth", COUNTS)
def test_the_tap_is_behind_the_middle_block_in_the_third_stage(depth: int) -> None:
    with torch.device("meta"):
        model = ImageNetResNet(depth=depth, width=2)
    blocks = list(rewriting.gates(model))
    assert len(blocks) == sum(COUNTS[depth])
    (tap,) = (node for node in rewriting.trace(model).graph.nodes if node.target == "side_tap")
    middle = blocks[len(blocks) // 2]
    assert middle.startswith("stages.2.")
    assert str(tap.args[0]) == middle.replace(".", "_") + "_gate"
    assert [t.channels for t in rewriting.taps(model)] == [8 if depth < 50 else 32]


def leading_norms(block: nn.Module) -> tuple[int, int]:
    """Norms on the way of both paths, and at the beginning of the branch alone."""
    assert isinstance(block, PreactivationBlock)
    first = next(iter(block.branch.children()))
    return len(list(block.preactivation.children())) // 2, int(isinstance(first, nn.BatchNorm2d))


@pytest.mark.parametrize("depth", [34, 50])
def test_where_the_leading_norm_acts(depth: int) -> None:
    with torch.device("meta"):
        model = ImageNetResNet(depth=depth, width=2)
    found = [[leading_norms(block) for block in stage.children()] for stage in model.stages]
    for index, (stage, count) in enumerate(zip(found, COUNTS[depth], strict=True)):
        assert stage == [(1, 0) if index else (0, 0), *[(0, 1)] * (count - 1)]


def test_shortcuts_carry_weights_only_where_channels_change() -> None:
    with torch.device("meta"):
        basic, bottleneck = (ImageNetResNet(depth=depth, width=2) for depth in (18, 50))
    for model, expected in ((basic, [0, 1, 1, 1]), (bottleneck, [1, 1, 1, 1])):
        for stage, first in zip(model.stages, expected, strict=True):
            found = [isinstance(b.shortcut, nn.Conv2d) for b in stage.children()]
            assert found == [bool(first)] + [False] * (len(found) - 1)


def test_blocks_are_their_layers_in_the_order_of_the_paper() -> None:
    x = torch.randn(2, 8, 6, 6)
    both = PreactivationBlock(8, 4, bottleneck=True, stride=2, before="both").eval()
    norm, act = both.preactivation.children()
    conv1, norm1, _, conv2, norm2, _, conv3 = both.branch.children()
    ready = act(norm(x))
    branch = conv3(norm2(conv2(norm1(conv1(ready)).relu())).relu())
    assert torch.equal(both(x), both.shortcut(ready) + branch)
    assert [conv.stride for conv in (conv1, conv2, conv3)] == [(1, 1), (2, 2), (1, 1)]
    alone = PreactivationBlock(8, 8, bottleneck=False, stride=1, before="branch").eval()
    norm, _, conv1, norm1, _, conv2 = alone.branch.children()
    assert torch.equal(alone(x), x + conv2(norm1(conv1(norm(x).relu())).relu()))
    bare = PreactivationBlock(8, 8, bottleneck=False, stride=1, before="nothing").eval()
    conv1, norm1, _, conv2 = bare.branch.children()
    assert torch.equal(bare(x), x + conv2(norm1(conv1(x)).relu()))


def test_a_dead_first_block_leaves_norm_and_shortcut() -> None:
    model = ImageNetResNet(depth=18, width=2, classes=3)
    left = rewriting.remove_blocks(model, ["stages.1.0"])
    kept = {name.split(".")[3] for name in left.state_dict() if name.startswith("stages.1.0.")}
    assert kept == {"preactivation", "shortcut"}
    rewriting.gates(model)["stages.1.0"].latch()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(left(x), model(x))


def test_gates_are_open_at_first() -> None:
    model = ImageNetResNet(depth=18, width=2)
    gates = [module for module in model.modules() if isinstance(module, EpsilonGate)]
    assert all(float(gate.epsilon) == 0 for gate in gates)


@pytest.mark.parametrize("depth", [20, 0, -18])
def test_impossible_depths(depth: int) -> None:
    with pytest.raises(ValueError, match=r"one of 18, 34, 50, 101, 152, not "):
        ImageNetResNet(depth=depth)


def test_impossible_sizes() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        ImageNetResNet(depth=18, classes=0)
