"""Small residual networks without batch norm: what they answer depends on each image alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Smooth(nn.Module):
    """Two blocks on one channel, 8x8."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.one = nn.Conv2d(6, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 6, 3, padding=1)
        self.head: nn.Module = nn.Linear(6 * 16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + torch.relu(self.one(x))
        x = x + torch.relu(self.two(x))
        logits: Tensor = self.head(nn.functional.avg_pool2d(x, 2).flatten(1))
        return logits


class Dropping(Smooth):
    """The same with dropout, which draws a new mask in every step."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.head = nn.Sequential(nn.Dropout(0.5), self.head)


class ReZero(Smooth):
    """Its branches are scaled by parameters without dimensions, which start at zero."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.first = nn.Parameter(torch.tensor(0.0))
        self.second = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.first * torch.relu(self.one(x))
        x = x + self.second * torch.relu(self.two(x))
        logits: Tensor = self.head(nn.functional.avg_pool2d(x, 2).flatten(1))
        return logits


class Headless(Smooth):
    """Its logits are normalised, so that no linear layer computes them last."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.norm = nn.LayerNorm(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.norm(super().forward(x))
        return logits
