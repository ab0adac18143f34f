"""Targets of pruning: the share of a network's cost that is to be left."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from eps_core.errors import ConfigError
from eps_train.gating import rewriting
from eps_train.models.spec import cost


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCosts:
    """Cost of a network and of its blocks, in the unit of a target.

    Attributes:
        whole: of the network with all blocks.
        blocks: what is saved by removing each gated block.
    """

    whole: float
    blocks: Mapping[str, float]

    def least(self, stages: Mapping[str, str]) -> float:
        """Smallest share of the cost that pruning can leave: every stage keeps a block.

        Args:
            stages: stage by block (`rewriting.stages`).
        """
        kept: dict[str, float] = {}
        for block, size in self.blocks.items():
            kept[stages[block]] = min(size, kept.get(stages[block], size))
        return (self.whole - sum(self.blocks.values()) + sum(kept.values())) / self.whole


@dataclass(frozen=True, slots=True)
class Target:
    """Share of a cost, 0 to 1, that is to be left. Raises ConfigError for other shares."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(
                f"{self}: the share to keep must be between 0 and 1, both excluded; 0.5 keeps half"
            )

    @property
    def unit(self) -> str:
        """The cost, as messages name it."""
        return type(self).__name__.lower()

    def measure(self, model: fx.GraphModule, input_shape: tuple[int, int, int]) -> float:
        """Return the cost of a network for one input of this shape."""
        raise ConfigError(f"{self}: this cost cannot be measured yet; use Parameters or Flops")

    def costs(self, model: fx.GraphModule, input_shape: tuple[int, int, int]) -> BlockCosts:
        """Return the costs of a gated network and of its blocks."""
        skeleton = copy.deepcopy(model).to("meta")
        whole = self.measure(skeleton, input_shape)
        return BlockCosts(
            whole=whole,
            blocks={
                block: whole - self.measure(rewriting.remove_blocks(skeleton, [block]), input_shape)
                for block in rewriting.gates(skeleton)
            },
        )


@dataclass(frozen=True, slots=True)
class Parameters(Target):
    """Keep at most this share of the learned parameters."""

    def measure(self, model: fx.GraphModule, input_shape: tuple[int, int, int]) -> float:
        return sum(parameter.numel() for parameter in model.parameters())

    def costs(self, model: fx.GraphModule, input_shape: tuple[int, int, int]) -> BlockCosts:
        return BlockCosts(
            whole=self.measure(model, input_shape), blocks=rewriting.branch_parameters(model)
        )


@dataclass(frozen=True, slots=True)
class Flops(Target):
    """Keep at most this share of the floating-point operations of one image."""

    def measure(self, model: fx.GraphModule, input_shape: tuple[int, int, int]) -> float:
        return cost(model, input_shape).flops

    def costs(self, model: fx.GraphModule, input_shape: tuple[int, int, int]) -> BlockCosts:
        skeleton = copy.deepcopy(model).to("meta").eval()
        counted = _FlopsByStep(skeleton)
        with counted.counter, torch.no_grad():
            counted.run(torch.empty((1, *input_shape), device="meta"))
        return BlockCosts(
            whole=sum(counted.flops.values()),
            blocks={
                block: sum(counted.flops[node] for node in rewriting.branch_nodes(gate))
                for gate, block in rewriting.gate_nodes(skeleton).items()
            },
        )


class _FlopsByStep(fx.Interpreter):
    """Runs a graph, and counts the FLOPs of each of its steps."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.counter = FlopCounterMode(display=False)
        self.flops: dict[fx.Node, int] = {}

    def run_node(self, node: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        result = super().run_node(node)
        self.flops[node] = self.counter.get_total_flops() - before
        return result


@dataclass(frozen=True, slots=True)
class Latency(Target):
    """Keep at most this share of the latency."""
