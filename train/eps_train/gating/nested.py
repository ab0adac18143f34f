"""Nested sub-networks: one set of weights, trained to work at every depth.

Blocks are ordered by importance. Each training step runs the whole network and one sub-network that
keeps the first blocks of that order, so that every such prefix works as a network of its own (the
sandwich rule of Yu and Huang, ICCV 2019, 1903.05134; for depth: Kang and Lee, NeurIPS 2024).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from eps_train.gating import rewriting
from eps_train.gating.costs import plain
from eps_train.gating.tracing import in_mode

SMALLEST = 0.2  # share of the blocks that the smallest sub-network keeps
SMALLEST_STEPS = 0.25  # share of the steps that train the smallest


def nested_order(scores: Mapping[str, float], stages: Mapping[str, str]) -> tuple[str, ...]:
    """Return blocks from the most important to the least; first of all, the best of each stage.

    `scores` and `stages` (`rewriting.stages`) are by block. Every sub-network keeps a block of each
    stage.
    """
    ranked = sorted(scores, key=lambda block: -scores[block])
    best = {stages[block]: block for block in reversed(ranked)}.values()
    return tuple(sorted(ranked, key=lambda block: block not in best))  # stable


def smallest_size(stages: Mapping[str, str]) -> int:
    """Return the number of blocks of the smallest sub-network: `SMALLEST`, one a stage at least."""
    return max(len(set(stages.values())), round(SMALLEST * len(stages)))


class SubNetworks:
    """The sub-networks of a gated network, which share its modules and tensors.

    Args:
        model: a network with gates.
        order: all of its gated blocks, from the first to stay to the first to go.
        smallest: number of blocks that the smallest sub-network keeps, below that of all blocks.

    Raises:
        ValueError: `order` does not name the gated blocks, or `smallest` is out of range.
    """

    def __init__(self, model: fx.GraphModule, order: Sequence[str], *, smallest: int) -> None:
        if sorted(order) != sorted(rewriting.gates(model)):
            raise ValueError("order must name every gated block once")
        if not 0 <= smallest < len(order):
            raise ValueError(f"smallest must be below {len(order)}, not {smallest}")
        self.order, self.smallest = tuple(order), smallest
        self._model = model
        self._made: dict[int, fx.GraphModule] = {}

    def keep(self, count: int) -> fx.GraphModule:
        """Return the sub-network that keeps the first `count` blocks of the order.

        It has plain additions in place of gates, and the mode of the whole network. The same count
        gives the same object.
        """
        if count not in self._made:
            self._made[count] = plain(self._model, self.order[count:])
        return self._made[count].train(self._model.training)

    def draw(self) -> int:
        """Return the number of blocks of the next sub-network to train (the sandwich rule).

        It is the smallest in `SMALLEST_STEPS` of all cases; the others are equally likely in the
        rest. torch's global generator decides, whose state the checkpoints of a run hold.
        """
        larger = len(self.order) - 1 - self.smallest
        if not larger or torch.rand(()).item() < SMALLEST_STEPS:
            return self.smallest
        return self.smallest + 1 + int(torch.randint(larger, ()))

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits `[N, classes]` of a sub-network that is drawn at random.

        Running statistics of batch norms stay those of the whole network.

        Args:
            images: normalised float `[N, C, H, W]`.
        """
        network = self.keep(self.draw())
        with _momentum(_norms(network), 0.0):
            logits: Tensor = network(images)
        return logits


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of all batch norms to those of these batches, in place.

    A sub-network's activations have other statistics than the whole network's, whose running
    averages it shares. Everything but the batch norms runs in evaluation mode.

    Args:
        model: on the device of the batches; it ends in the mode that it had.
        batches: normalised images `[N, C, H, W]`, with the same N in each.
    """
    norms = _norms(model)
    with in_mode(model, False), torch.no_grad():
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
        for count, batch in enumerate(batches):
            with _momentum(norms, 1 / (count + 1)):  # the plain mean over the batches
                model(batch)


def _norms(model: nn.Module) -> list[_BatchNorm]:
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if norm.track_running_stats]


@contextmanager
def _momentum(norms: Sequence[_BatchNorm], momentum: float) -> Iterator[None]:
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = momentum
    try:
        yield
    finally:
        for norm, value in zip(norms, before, strict=True):
            norm.momentum = value
