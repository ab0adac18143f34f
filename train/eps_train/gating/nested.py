"""Nested sub-networks: one set of weights, trained to work at every depth.

Blocks are ordered by importance. Each training step runs the whole network and one sub-network that
keeps a prefix of that order, so that every prefix works as a network of its own (the sandwich rule
of Yu and Huang, ICCV 2019, 1903.05134; skippable halves: Kang and Lee, NeurIPS 2024).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from eps_train.gating import rewriting

SMALLEST = 0.25  # share of the steps that train the smallest sub-network


def nested_order(scores: Mapping[str, float], stages: Mapping[str, str]) -> tuple[str, ...]:
    """Blocks from the most important to the least; the first of all is the best of each stage.

    Args:
        scores: importance by block.
        stages: stage by block (`rewriting.stages`). Every sub-network keeps a block of each.
    """
    ranked = sorted(scores, key=lambda block: -scores[block])
    best: dict[str, str] = {}
    for block in ranked:
        best.setdefault(stages[block], block)
    first = set(best.values())
    return (
        *(block for block in ranked if block in first),
        *(block for block in ranked if block not in first),
    )


class SubNetworks:
    """The sub-networks of a gated network, which share its modules and tensors.

    Args:
        model: a network with gates.
        order: all of its gated blocks, from the first to stay to the first to go.
        smallest: blocks of the smallest sub-network.

    Raises:
        ValueError: `order` does not name the gated blocks, or `smallest` is not within them.
    """

    def __init__(self, model: fx.GraphModule, order: Sequence[str], *, smallest: int) -> None:
        if sorted(order) != sorted(rewriting.gates(model)):
            raise ValueError("order must name every gated block once")
        if not 0 <= smallest < max(len(order), 1):
            raise ValueError(f"smallest must be below {len(order)}, not {smallest}")
        self.order, self.smallest = tuple(order), smallest
        self._model = model
        self._made: dict[int, fx.GraphModule] = {}

    def __len__(self) -> int:
        """Sub-networks, the whole network not counted."""
        return len(self.order) - self.smallest

    def keep(self, count: int) -> fx.GraphModule:
        """Return the sub-network that keeps the first `count` blocks of the order.

        The same object for the same count. It has the mode of the whole network.
        """
        if count not in self._made:
            self._made[count] = rewriting.remove_blocks(self._model, self.order[count:])
        return self._made[count].train(self._model.training)

    def draw(self, generator: random.Random) -> int:
        """Return the number of blocks of the sub-network to train next (the sandwich rule).

        The smallest in a quarter of the steps, any other with equal probability in the rest.
        """
        larger = range(self.smallest + 1, len(self.order))
        if not larger or generator.random() < SMALLEST:
            return self.smallest
        return generator.choice(larger)


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of all batch norms to those of these batches, in place.

    A sub-network's activations have other statistics than the whole network's, whose running
    averages it shares. Everything but the batch norms runs in evaluation mode.

    Args:
        model: on the device of the batches; it ends in the mode that it had.
        batches: normalised images `[N, C, H, W]`, with the same N in each.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
    try:
        with torch.no_grad():
            for count, batch in enumerate(batches):
                for norm in norms:
                    norm.momentum = 1 / (count + 1)  # the plain mean over the batches
                model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
