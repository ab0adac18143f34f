"""A user's own network and training loop, small enough for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eps_train.gating.pruner import BlockPruner

SHUT = 1e9  # epsilon above every response
STEPS = 3  # of an epoch


class Residual(nn.Module):
    """A convolution with batch norm and a learned scale without dimensions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.scale * self.norm(self.conv(x)))


class OwnNet(nn.Module):
    """Residual blocks on grey images of 8x8; a factory for `--model` too."""

    def __init__(self, num_classes: int = 10, *, blocks: int = 3, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


class SubsetPruner(BlockPruner):
    """Shuts the gates of some blocks, and holds all others open."""

    shut: Sequence[str] = ("blocks.1",)

    def thresholds(self, epoch: int) -> dict[str, float]:
        return {block: SHUT if block in self.shut else 0.0 for block in self.gates}


def own_net(seed: int = 0) -> OwnNet:
    torch.manual_seed(seed)
    return OwnNet()


def batches(count: int = STEPS, *, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Batches of images, pixels 0 to 1, and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(0, 256, (8, 1, 8, 8), generator=generator) / 255,
            torch.randint(0, 10, (8,), generator=generator),
        )
        for _ in range(count)
    ]


HELDOUT = batches(2, seed=2)
EXAMPLE = HELDOUT[0][0]


def train_epoch(
    pruner: BlockPruner,
    optimizer: Optimizer,
    *,
    call: Callable[[Tensor], Tensor] | None = None,
    after: Callable[[], None] = lambda: None,
    data: Sequence[tuple[Tensor, Tensor]] = tuple(batches()),
) -> None:
    """One epoch of a plain loop; `call` is the network as it is wrapped."""
    pruner.model.train()
    run = pruner.model if call is None else call
    for images, labels in data:
        logits = run(images)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        after()
        pruner.step()


def sgd(pruner: BlockPruner, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(pruner.model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


def pruned(net: nn.Module | None = None, **settings: Any) -> BlockPruner:
    """A pruner that has removed the middle block of three; classes `a` to `j`."""
    made = SubsetPruner(
        net or own_net(), example=EXAMPLE, epsilon=SHUT, classes=list("abcdefghij"), **settings
    )
    optimizer = sgd(made)
    for _ in range(2):
        train_epoch(made, optimizer)
        made.end_epoch(HELDOUT, optimizer=optimizer)
    assert made.tracker.dead == ("blocks.1",)
    return made
