"""The paper's ImageNet family, with gates in place: pre-activation, basic or bottleneck blocks."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from eps_train.gating.gate import EpsilonGate
from eps_train.models.cifar import GatedResNet

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
        stages = []
        channels = width
        for stage, count in enumerate(counts):
            blocks = nn.Sequential()
            for index in range(count):
                inner = width * 2**stage
                blocks.append(
                    PreactivationBlock(
                        channels,
                        inner,
                        bottleneck=bottleneck,
                        stride=2 if stage and not index else 1,
                        before="branch" if index else "both" if stage else "nothing",
                    )
                )
                channels = inner * EXPANSION if bottleneck else inner
            stages.append(blocks)
        tap = (2, sum(counts) // 2 - sum(counts[:2]))
        super().__init__(stem, stages, tap=tap, channels=channels, classes=classes)
