"""Times of several networks against each other: interleaved, one image a call.

What is timed is what ships: folded, behind its normalisation, without gates and taps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from eps_compact.branch_costs import BranchCost
from eps_compact.exporting import FromPixels
from eps_compact.folding import fold
from eps_compact.interleaving import interleave, wall
from eps_compact.intervals import Interval, difference_of_medians
from eps_train import graph
from eps_train.data import DataIdentity
from eps_train.devices import cpu_threads

Runs = npt.NDArray[np.float64]  # milliseconds


class Timer(Protocol):
    """Times a network against what is left of it without some of its blocks.

    Attributes:
        name: what it runs them with, as a report says it.
    """

    name: str

    def load(self, model: fx.GraphModule, image: Tensor) -> Measure:
        """Make all ready that does not depend on which blocks are to be left out.

        Args:
            model: a network with gates at all blocks that may be left out.
            image: one raw image, uint8 `[1, C, H, W]`, on the network's device.

        Raises:
            GraphError: what runs them cannot run this network.
        """


class Measure(Protocol):
    """Times the networks that are left of one network without some of its blocks."""

    def __call__(self, without: Sequence[Collection[str]], seconds: float) -> list[list[Runs]]:
        """Milliseconds of every run, by network and block; see :mod:`eps_compact.interleaving`.

        Args:
            without: of each network, the blocks that it lacks.
            seconds: to spend; a few runs are made in any case.
        """


class TorchTimer:
    """Times networks as PyTorch runs them: eager, channels-last, one thread, one image a call.

    Args:
        identity: the data that the networks were trained on.
    """

    name = f"torch {torch.__version__} eager, one thread, batch 1"

    def __init__(self, identity: DataIdentity) -> None:
        self._identity = identity

    def load(self, model: fx.GraphModule, image: Tensor) -> Measure:
        """As `Timer` has it."""
        if image.is_cuda:
            device = torch.cuda.get_device_name(image.device)
            self.name = f"torch {torch.__version__} eager on {device}, batch 1"
        folded, _ = fold(model)
        folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def call(network: nn.Module) -> None:
            network(image)
            if image.is_cuda:
                torch.cuda.synchronize(image.device)

        @torch.no_grad()
        def measure(without: Sequence[Collection[str]], seconds: float) -> list[list[Runs]]:
            networks = [
                FromPixels(plain(folded, blocks), self._identity).to(image.device)
                for blocks in without
            ]
            with cpu_threads(1):
                return interleaved([partial(call, network) for network in networks], seconds)

        return measure


def interleaved(calls: Sequence[Callable[[], object]], seconds: float) -> list[list[Runs]]:
    """Time calls that return when their work is done, in turns: as :class:`Measure` gives them."""
    turns = interleave([wall(call) for call in calls], budget=seconds)
    return [[1000 * block for block in blocks] for blocks in turns.times]


def block_times(
    costs: Iterable[BranchCost], measure: Measure, seconds: float
) -> dict[str, Interval]:
    """Milliseconds that each block takes, by name, with 95 % intervals.

    Blocks of one kind (the same layers on the same shapes) take the same time. Each kind is timed
    once: the whole network against the one without any block of that kind, divided by their number.

    Args:
        costs: of all blocks of the network that `measure` was loaded with.
        seconds: to spend.
    """
    kinds: dict[str, list[str]] = {}
    for cost in costs:
        kinds.setdefault(cost.kind, []).append(cost.block)
    if not kinds:
        return {}
    whole, *less = measure([(), *kinds.values()], seconds)
    found: dict[str, Interval] = {}
    for blocks, runs in zip(kinds.values(), less, strict=True):
        joint = difference_of_medians(whole, runs)
        count = len(blocks)
        each = Interval(joint.value / count, joint.low / count, joint.high / count)
        found |= dict.fromkeys(blocks, each)
    return found


def plain(model: fx.GraphModule, without: Iterable[str] = ()) -> fx.GraphModule:
    """The network as it would ship, without these blocks; it shares its tensors with `model`."""
    return graph.drop_taps(graph.drop_gates(graph.remove_blocks(model, without))).eval()
