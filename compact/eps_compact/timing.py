"""Times of several networks against each other: interleaved, one image a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from eps_compact.branch_costs import BranchCost
from eps_compact.intervals import Interval, difference_of_medians
from eps_train import graph
from eps_train.devices import cpu_threads

Runs = npt.NDArray[np.float64]  # milliseconds

MIN_ROUNDS = 5
MAX_ROUNDS = 100
_WARM_UP = 3  # runs of each network before any counts
_GOOD_RUNS = 5  # of one network in a round; rounds are added before they get longer than this
_MAX_RUNS = 20
_DISCARDED = 1  # first run in a round: the caches are still another network's


class Timer(Protocol):
    """Times networks side by side.

    Attributes:
        name: what it runs them with, as a report says it.
    """

    name: str

    def __call__(
        self, networks: Sequence[nn.Module], image: Tensor, seconds: float
    ) -> list[list[Runs]]:
        """Milliseconds of every run, by network and round; a round holds runs of every network.

        Args:
            networks: plain networks, in evaluation mode.
            image: one normalised float32 image `[1, C, H, W]`, on their device.
            seconds: to spend; a few rounds are made in any case.
        """


class TorchTimer:
    """Times networks as PyTorch runs them: eager, channels-last, one thread, one image a call."""

    name = f"torch {torch.__version__} eager, one thread, batch 1"

    @torch.no_grad()
    def __call__(
        self, networks: Sequence[nn.Module], image: Tensor, seconds: float
    ) -> list[list[Runs]]:
        image = image.contiguous(memory_format=torch.channels_last)
        for network in networks:
            # The tensors stay the same to whoever else holds them; only their order in memory
            # changes.
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def call(network: nn.Module) -> None:
            network(image)
            if image.is_cuda:
                torch.cuda.synchronize(image.device)

        with cpu_threads(1):
            return interleaved([partial(call, network) for network in networks], seconds)


def interleaved(calls: Sequence[Callable[[], object]], seconds: float) -> list[list[Runs]]:
    """Time calls that return when their work is done, in turns: as :class:`Timer` gives them.

    All are warmed up first. `seconds` are for all of it; `MIN_ROUNDS` are made in any case.
    """
    deadline = time.perf_counter() + seconds
    for call in calls:
        _times(call, _WARM_UP)
    began = time.perf_counter()
    for call in calls:
        _times(call, 1)
    turn = time.perf_counter() - began
    left = max(0.0, deadline - time.perf_counter())
    rounds, runs = plan(int(left / max(turn, 1e-9)))
    found: list[list[Runs]] = [[] for _ in calls]
    for number in range(rounds):
        if number >= MIN_ROUNDS and time.perf_counter() + turn * runs > deadline:
            break
        # There and back: what a call does to those after it meets not always the same ones.
        order = range(len(calls))
        for which in order if number % 2 == 0 else reversed(order):
            _times(calls[which], _DISCARDED)
            found[which].append(_times(calls[which], runs))
    return found


def plan(turns: int) -> tuple[int, int]:
    """Rounds, and runs of each call in a round, when there is time for so many turns of all.

    More rounds come first (the interval lives on them), then longer ones.
    """
    rounds = min(max(turns // (_GOOD_RUNS + _DISCARDED), MIN_ROUNDS), MAX_ROUNDS)
    return rounds, min(max(turns // rounds - _DISCARDED, 1), _MAX_RUNS)


def block_times(
    model: fx.GraphModule,
    costs: Iterable[BranchCost],
    timer: Timer,
    image: Tensor,
    seconds: float,
) -> dict[str, Interval]:
    """Milliseconds that each block takes, by name, with 95 % intervals.

    Blocks of one kind (the same layers on the same shapes) take the same time. Each kind is timed
    once: the whole network against the one without any block of that kind, divided by their number.

    Args:
        model: a network with the gates of all `costs`.
        image: as :class:`Timer` takes it.
        seconds: to spend.
    """
    kinds: dict[str, list[str]] = {}
    for cost in costs:
        kinds.setdefault(cost.kind, []).append(cost.block)
    if not kinds:
        return {}
    networks = [plain(model), *(plain(model, blocks) for blocks in kinds.values())]
    whole, *less = timer(networks, image, seconds)
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


def _times(call: Callable[[], object], runs: int) -> Runs:
    times = np.empty(runs)
    for index in range(runs):
        began = time.perf_counter()
        call()
        times[index] = 1000 * (time.perf_counter() - began)
    return times
