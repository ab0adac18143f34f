"""The paper's ResNet families with ε-gates in place, and the layers around any network.

A family is a factory of an ordinary `nn.Module` that maps normalized float images `[N, C, H, W]` to
logits `[N, classes]`. Its residual additions are :class:`~eps_train.gating.gate.EpsilonGate`
modules (with epsilon 0: open), and a :class:`Tap` marks where the training loop may attach the side
head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eps_train.gating.gate import EpsilonGate

if TYPE_CHECKING:
    from eps_train.data.dataset import DataIdentity


class Tap(nn.Identity):
    """Marks the activations that the training loop's side head reads with a forward hook."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels


class GatedResNet(nn.Module):
    """Stem, stages of blocks, pooled head and classifier.

    Each stage has twice the width of the one before and half its height and width. `block` makes a
    block from its input channels, width and stride, and the indices of its stage and of itself in
    that; it returns `expansion` times its width. The tap follows the block with the indices `tap`,
    whose stage has half of the last one's channels.
    """

    def __init__(
        self,
        stem: nn.Sequential,
        counts: Sequence[int],
        width: int,
        block: Callable[[int, int, int, int, int], nn.Module],
        *,
        expansion: int,
        tap: tuple[int, int],
        classes: int,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList()
        channels = width
        for stage, count in enumerate(counts):
            blocks = nn.Sequential()
            for index in range(count):
                inner, stride = width * 2**stage, 2 if stage and not index else 1
                blocks.append(block(channels, inner, stride, stage, index))
                channels = inner * expansion
            self.stages.append(blocks)
        self.side_tap = Tap(channels // 2)
        self.tap = tap
        self.head = pooling(channels)
        self.classifier = nn.Linear(channels, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, stage in enumerate(self.stages):
            for index, block in enumerate(stage.children()):
                x = block(x)
                if (number, index) == self.tap:
                    x = self.side_tap(x)
        logits: Tensor = self.classifier(self.head(x))
        return logits


# -- The CIFAR and SVHN family


class Downsample(nn.Module):
    """Parameter-free shortcut across a change of shape: 2x2 average pool, then zero channels.

    Odd sizes round up, as the strided convolution of the branch does; a border window averages the
    pixels that exist. Half of the new channels precede the old ones, the rest follow (as in the
    authors' code).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(F.avg_pool2d(x, 2, ceil_mode=True), self.padding)


class BasicBlock(nn.Module):
    """BN-ReLU-conv3x3-BN-ReLU-conv3x3 beside a shortcut, added by the gate."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, preactivated: bool = False
    ) -> None:
        super().__init__()
        # The first block follows the stem's BN-ReLU and has none of its own.
        self.bn1 = nn.Identity() if preactivated else nn.BatchNorm2d(in_channels)
        self.relu1 = nn.Identity() if preactivated else nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        same_shape = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same_shape else Downsample(in_channels, out_channels)
        self.gate = EpsilonGate()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(self.relu1(self.bn1(x)))
        branch = self.conv2(self.relu2(self.bn2(branch)))
        out: Tensor = self.gate(self.shortcut(x), branch)
        return out


class CifarResNet(GatedResNet):
    """The paper's CIFAR and SVHN family: depth 6n + 2, three stages of n blocks, widths w, 2w, 4w.

    Any image from 8x8 up, odd and non-square sizes too. Parameters at depth 110, width 16, RGB,
    10 classes: 1,727,962 (derived by hand in the tests).
    """

    def __init__(
        self, *, depth: int, width: int = 16, in_channels: int = 3, classes: int = 10
    ) -> None:
        n, rest = divmod(depth - 2, 6)
        if rest or n < 1:
            nearest = max(1, round((depth - 2) / 6)) * 6 + 2
            raise ValueError(
                f"depth must be 6n + 2 (8, 14, ..., 110, ...), not {depth}; try {nearest}"
            )
        if min(width, in_channels, classes) < 1:
            raise ValueError("width, in_channels and classes must be at least 1")
        stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )

        def block(channels: int, inner: int, stride: int, stage: int, index: int) -> nn.Module:
            preactivated = stage == index == 0
            return BasicBlock(channels, inner, stride=stride, preactivated=preactivated)

        # The tap follows the middle block of the second stage (paper's code).
        super().__init__(
            stem, (n, n, n), width, block, expansion=1, tap=(1, n // 2), classes=classes
        )


# -- The ImageNet family: pre-activation, basic or bottleneck blocks

# Blocks of the four stages, and whether they are bottlenecks.
DEPTHS: dict[int, tuple[tuple[int, int, int, int], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
EXPANSION = 4  # output channels of a bottleneck over its inner channels

Before = Literal["nothing", "branch", "both"]  # where a block's leading BN-ReLU acts


class PreactivationBlock(nn.Module):
    """BN-ReLU, then two 3x3 convolutions, or 1x1, 3x3, 1x1 for a bottleneck; BN-ReLU between them.

    The stride is that of the (first) 3x3 convolution. The shortcut is a 1x1 convolution where the
    number of channels changes. The leading BN-ReLU acts on the branch alone; in the first block of
    a later stage on both paths; the first block, which follows the stem's, has none.
    """

    def __init__(
        self, in_channels: int, width: int, *, bottleneck: bool, stride: int, before: Before
    ) -> None:
        super().__init__()
        out_channels = width * EXPANSION if bottleneck else width
        if bottleneck:
            convolutions = [
                nn.Conv2d(in_channels, width, 1, bias=False),
                nn.Conv2d(width, width, 3, stride, 1, bias=False),
                nn.Conv2d(width, out_channels, 1, bias=False),
            ]
        else:
            convolutions = [
                nn.Conv2d(in_channels, width, 3, stride, 1, bias=False),
                nn.Conv2d(width, width, 3, 1, 1, bias=False),
            ]
        layers: list[nn.Module] = [convolutions[0]]
        for convolution in convolutions[1:]:
            layers += [nn.BatchNorm2d(width), nn.ReLU(), convolution]
        leading: list[nn.Module] = [nn.BatchNorm2d(in_channels), nn.ReLU()]
        self.preactivation = nn.Sequential(*leading if before == "both" else ())
        self.branch = nn.Sequential(*leading if before == "branch" else (), *layers)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.gate = EpsilonGate()

    def forward(self, x: Tensor) -> Tensor:
        x = self.preactivation(x)
        out: Tensor = self.gate(self.shortcut(x), self.branch(x))
        return out


class ImageNetResNet(GatedResNet):
    """Depth 18 or 34 (basic blocks), 50, 101 or 152 (bottlenecks); widths w, 2w, 4w, 8w.

    The tap follows the middle block of the network, in the third stage. Parameters at depth 101,
    width 64, RGB, 1000 classes: 44,541,480 (derived by hand in the tests).
    """

    def __init__(
        self, *, depth: int, width: int = 64, in_channels: int = 3, classes: int = 1000
    ) -> None:
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}, not {depth}")
        if min(width, in_channels, classes) < 1:
            raise ValueError("width, in_channels and classes must be at least 1")
        counts, bottleneck = DEPTHS[depth]
        stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )

        def block(channels: int, inner: int, stride: int, stage: int, index: int) -> nn.Module:
            before: Before = "branch" if index else "both" if stage else "nothing"
            return PreactivationBlock(
                channels, inner, bottleneck=bottleneck, stride=stride, before=before
            )

        super().__init__(
            stem,
            counts,
            width,
            block,
            expansion=EXPANSION if bottleneck else 1,
            tap=(2, sum(counts) // 2 - sum(counts[:2])),
            classes=classes,
        )


# -- Layers around any network


class SideHead(nn.Module):
    """Side supervision (paper, section 4): BN-ReLU, global average pool, linear. Training only."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.layers = pooling(channels)
        self.classifier = nn.Linear(channels, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.layers(x))
        return logits


def pooling(channels: int) -> nn.Sequential:
    """BN-ReLU and global average pool, `[N, C, H, W]` to `[N, C]`."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def initialise(model: nn.Module) -> None:
    """He initialization, fan-out, for convolutions; zero bias for linear layers."""
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            continue  # nothing to fill; torch would compute a std all the same
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class Normalize(nn.Module):
    """uint8 images `[N, C, H, W]` to float32 `(pixel - mean) / std`.

    In pixel units 0..255: the mean per channel, or the mean image `[C][H][W]`; the std per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[object], std: Sequence[float]) -> None:
        super().__init__()
        center = torch.tensor(mean, dtype=torch.float32)
        self.register_buffer("mean", center[None] if center.dim() == 3 else _by_channel(center))
        self.register_buffer("std", _by_channel(torch.tensor(std, dtype=torch.float32)))

    @classmethod
    def of(cls, identity: DataIdentity) -> Normalize:
        """The normalization of a data set."""
        return cls(list(identity.mean), list(identity.std))

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(torch.float32) - self.mean) / self.std


class FromPixels(nn.Module):
    """A network behind its normalisation: uint8 `[N, C, H, W]` to logits float32 `[N, classes]`."""

    def __init__(self, network: nn.Module, identity: DataIdentity) -> None:
        super().__init__()
        self.normalize = Normalize.of(identity)
        self.network = network
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(images))
        return logits


def _by_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)
