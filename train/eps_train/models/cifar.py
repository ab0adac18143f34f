"""Network families with ε-gates in place: pre-activation residual networks as in the paper.

A family is a factory of an ordinary `nn.Module` that maps normalised float images `[N, C, H, W]` to
logits `[N, classes]`. Its residual additions are :class:`~eps_train.gating.gate.EpsilonGate`
modules (with epsilon 0: open), and a :class:`Tap` marks where the training loop may attach the side
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eps_train.gating.gate import EpsilonGate

if TYPE_CHECKING:
    from eps_train.data.dataset import DataIdentity


class Tap(nn.Identity):
    """A named point of a network whose activations the training loop reads with a forward hook."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels


class Downsample(nn.Module):
    """Parameter-free shortcut across a change of shape: 2x2 average pool, then zero channels.

    Odd sizes round up, as the strided convolution of the branch does; a border window averages the
    pixels that exist. Half of the new channels go before the old ones, the rest after (as in the
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
        # The very first block sits behind the stem's own BN-ReLU and has none of its own.
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


class CifarResNet(nn.Module):
    """The paper's CIFAR and SVHN family: depth 6n + 2, three stages of n blocks, widths w, 2w, 4w.

    Any image from 8x8 up, odd and non-square sizes too. Parameters at depth 110, width 16, RGB,
    10 classes: 1,727,962 (derived by hand in the tests).
    """

    def __init__(
        self, *, depth: int, width: int = 16, in_channels: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        n, rest = divmod(depth - 2, 6)
        if rest or n < 1:
            nearest = max(1, round((depth - 2) / 6)) * 6 + 2
            raise ValueError(
                f"depth must be 6n + 2 (8, 14, ..., 110, ...), not {depth}; try {nearest}"
            )
        if min(width, in_channels, classes) < 1:
            raise ValueError("width, in_channels and classes must be at least 1")
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.ModuleList()
        channels = width
        for index, out_channels in enumerate((width, 2 * width, 4 * width)):
            stage = nn.Sequential()
            for block in range(n):
                first = block == 0
                stage.append(
                    BasicBlock(
                        channels,
                        out_channels,
                        stride=2 if first and index else 1,
                        preactivated=first and not index,
                    )
                )
                channels = out_channels
            self.stages.append(stage)
        self.side_tap = Tap(2 * width)
        self.side_after = n // 2  # block of stage 2 after which the side head looks (paper's code)
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.classifier = nn.Linear(channels, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[0](self.stem(x))
        for index, block in enumerate(self.stages[1].children()):
            x = block(x)
            if index == self.side_after:
                x = self.side_tap(x)
        logits: Tensor = self.classifier(self.head(self.stages[2](x)))
        return logits


class SideHead(nn.Module):
    """Side supervision (paper, section 4): BN-ReLU, global average pool, linear. Training only."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.classifier = nn.Linear(channels, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.layers(x))
        return logits


def initialise(model: nn.Module) -> None:
    """He initialisation, fan-out, for convolutions; zero bias for linear layers."""
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            continue  # nothing to fill; torch would work out a standard deviation all the same
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class Normalize(nn.Module):
    """uint8 images `[N, C, H, W]` to float32 `(pixel - mean) / std`.

    In pixel units 0..255: a mean per channel, or a mean image `[C][H][W]`; a deviation per channel.
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
        """The one of a data set."""
        return cls(list(identity.mean), list(identity.std))

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(torch.float32) - self.mean) / self.std


def _by_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)
