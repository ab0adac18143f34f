"""What it costs that the gates of several processes decide together (`--gate-scope global`)."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from eps_train import graph
from eps_train.distributed import Group
from eps_train.forward import TrainedNetwork

ROUNDS = 10


@dataclass(frozen=True, slots=True)
class AgreementCost:
    """Seconds of one training forward pass, eager, in float32: gates apart, and together.

    Medians over `ROUNDS` passes each, taken in turn; waiting for the slowest process is in both,
    for the passes start together, but between the gates of one pass only in the second.
    """

    apart: float
    together: float

    @property
    def seconds(self) -> float:
        """What a step takes longer."""
        return self.together - self.apart


@torch.no_grad()
def measure(network: TrainedNetwork, images: Tensor, group: Group) -> AgreementCost:
    """Time passes of normalised `images` through copies of `network`, which is left as it was."""
    apart, together = copy.deepcopy(network).train(), copy.deepcopy(network).train()
    for gate in graph.gates(together.model).values():
        gate.process_group = group.world
    on_gpu = [images.device] if images.device.type == "cuda" else []
    times: dict[TrainedNetwork, list[float]] = {apart: [], together: []}
    with torch.random.fork_rng(devices=on_gpu):
        for _ in range(ROUNDS + 2):
            for contender, taken in times.items():
                group.post_largest(0)()  # all start together
                _synchronise(images.device)
                started = time.perf_counter()
                contender(images)
                _synchronise(images.device)
                taken.append(time.perf_counter() - started)
    return AgreementCost(*(statistics.median(taken[2:]) for taken in times.values()))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
