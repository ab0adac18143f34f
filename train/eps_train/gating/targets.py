"""Targets of pruning: the share of a network's parameters, FLOPs or latency to keep.

A :class:`Target` says what is wanted, :class:`BlockCosts` what the network and each of its blocks
cost in that currency; :mod:`eps_train.gating.costs` counts or measures them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from eps_core.errors import ConfigError

Currency = Literal["parameters", "flops", "latency"]

# Options that set a target, by the names of their fields, and what they count. A speed-up of 2 is
# half of the latency.
TARGETS: Mapping[str, Currency] = {
    "target_parameters": "parameters",
    "target_flops": "flops",
    "target_latency": "latency",
    "target_speedup": "latency",
}


@dataclass(frozen=True, slots=True)
class Target:
    """Share of a network's cost to keep at most. Raises ConfigError for a share that is none.

    Attributes:
        currency: what the cost is counted in.
        share: of the network with all blocks, between 0 and 1.
        option: the option that set it, with its value, for messages: `--target-speedup 2`.
    """

    currency: Currency
    share: float
    option: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"{self}: must be between 0 and 1, the share to keep")

    @classmethod
    def of(cls, name: str, value: float) -> Target:
        """The target of the option with the field `name`, one of `TARGETS`."""
        option = f"--{name.replace('_', '-')} {value:g}"
        if name != "target_speedup":
            return cls(TARGETS[name], value, option)
        if not 1 < value < math.inf:
            raise ConfigError(f"{option}: must be finite and above 1")
        return cls(TARGETS[name], 1 / value, option)

    def __str__(self) -> str:
        """As it was given."""
        return self.option or f"{self.currency.capitalize()}({self.share:g})"

    @property
    def unit(self) -> str:
        """What is kept a share of: `parameters`, `FLOPs` or `latency`."""
        return "FLOPs" if self.currency == "flops" else self.currency

    @property
    def relax(self) -> str:
        """How to ask for less: `raise --target-flops`."""
        name, _, _ = str(self).partition(" ")
        return f"{'lower' if name == '--target-speedup' else 'raise'} {name}"


Parameters = partial(Target, "parameters")
Flops = partial(Target, "flops")
Latency = partial(Target, "latency")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCosts:
    """What a network costs, and what the removal of each of its blocks saves.

    Attributes:
        currency: parameters, FLOPs of one image, or milliseconds of a call with one image.
        whole: cost of the network with all blocks.
        blocks: what the removal of each block alone saves, by name; 0 for one that saves nothing.
        timer: name of the timer that measured a latency; "" for what is counted.
    """

    currency: Currency
    whole: float
    blocks: Mapping[str, float]
    timer: str = ""

    def without(self, removed: Iterable[str]) -> float:
        """Predict the cost of the network without some blocks."""
        return self.whole - sum(self.blocks[block] for block in removed)

    def least(self, stages: Mapping[str, str]) -> float:
        """Return the least share of the cost that pruning can reach.

        Each of `stages` (`rewriting.stages`) keeps its cheapest block.
        """
        kept: dict[str, float] = {}
        for block, saved in self.blocks.items():
            kept[stages[block]] = min(saved, kept.get(stages[block], saved))
        return (self.without(self.blocks) + sum(kept.values())) / self.whole

    def describe(self, target: Target) -> str:
        """Return one line: the target in units of its currency, and what the blocks cost."""
        low, high = min(self.blocks.values()), max(self.blocks.values())
        wanted = target.share * self.whole
        line = f"target: {target.share:.1%} of the {target.unit} ({target}), "
        if self.currency != "latency":
            return f"{line}{wanted:,.0f} of {self.whole:,.0f}; {low:,.0f} to {high:,.0f} a block"
        return (
            f"{line}{wanted:.3f} of {self.whole:.3f} ms a call; {low:.4f} to {high:.4f} ms a block"
            f" ({self.timer})"
        )


def cheapness(loss: float, saved: float) -> tuple[float, float]:
    """Sort key of blocks by how cheap it is to lose them, the next to go first.

    `loss` is the block's importance or the rise of the loss without it, `saved` what its removal
    saves. A loss that falls ranks as one that stays: a gain below the noise is no reason to prefer
    a block that saves little.
    """
    return max(loss, 0.0) / max(saved, 1e-9), -saved
