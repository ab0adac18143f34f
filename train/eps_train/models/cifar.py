"""The paper's CIFAR and SVHN family with ε-gates in place, and the layers around any network.

A family is a factory of an ordinary `nn.Module` that maps normalized float images `[N, C, H, W]` to
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
    """Marks the activations that the training loop's side head reads with a forward hook."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels


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


class GatedResNet(nn.Module):
    """Stem, stages of blocks, pooled head and classifier.

    The tap follows block `tap[1]` of stage `tap[0]`, which has half of the last stage's `channels`.
    """

    def __init__(
        self,
        stem: nn.Sequential,
        stages: Sequence[nn.Sequential],
        *,
        tap: tuple[int, int],
        channels: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
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
        stages = []
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
            stages.append(stage)
        # The tap follows the middle block of the second stage (paper's code).
        super().__init__(stem, stages, tap=(1, n // 2), channels=channels, classes=classes)


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
