"""Times of blocks, with a timer that says what it is told; and PyTorch's, for its shape alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eps_compact.branch_costs import branch_costs
from eps_compact.timing import MAX_ROUNDS, MIN_ROUNDS, Runs, TorchTimer, block_times, plain, plan
from eps_train import graph
from eps_train.gate import EpsilonGate
from eps_train.networks import CifarResNet


class LayerTimer:
    """A millisecond for each convolution, and as much again for one of more than 8 channels."""

    name = "a millisecond a convolution"

    def __init__(self) -> None:
        self.networks: Sequence[nn.Module] = ()

    def __call__(
        self, networks: Sequence[nn.Module], image: Tensor, seconds: float
    ) -> list[list[Runs]]:
        self.networks = networks
        return [[np.full(3, self._time(network))] * 4 for network in networks]

    def _time(self, network: nn.Module) -> float:
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        return sum(1.0 + (m.out_channels > 8) for m in convolutions)


def test_each_kind_is_timed_once_and_shared_out() -> None:
    model = graph.trace(CifarResNet(depth=20, width=4).eval())
    timer = LayerTimer()
    image = torch.zeros(1, 3, 32, 32)
    times = block_times(model, branch_costs(model, (3, 32, 32)), timer, image, 1.0)
    assert len(timer.networks) == 1 + 6, "the whole network, and one without each kind"
    assert {b: t.value for b, t in times.items()} == {
        b: 4.0 if b.startswith("stages.2") else 2.0 for b in graph.gates(model)
    }
    assert all(t.low == t.value == t.high for t in times.values())


def test_what_is_timed_is_what_ships() -> None:
    model = graph.trace(CifarResNet(depth=8, width=4).eval())
    shipped = plain(model, ["stages.1.0"])
    assert not any(isinstance(module, EpsilonGate) for module in shipped.modules())
    assert not graph.taps(shipped)
    assert shipped.get_parameter("classifier.weight") is model.get_parameter("classifier.weight")


def test_torch_times_every_network_as_often_as_the_others() -> None:
    """Even without any time, a few rounds are made; threads are as before."""
    threads = torch.get_num_threads()
    networks = [nn.Conv2d(1, 1, 3).eval(), nn.Conv2d(1, 2, 3).eval()]
    found = TorchTimer()(networks, torch.zeros(1, 1, 8, 8), seconds=0.0)
    assert [len(rounds) for rounds in found] == [MIN_ROUNDS, MIN_ROUNDS]
    assert all((runs > 0).all() for rounds in found for runs in rounds)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("turns", "expected"),
    [(0, (MIN_ROUNDS, 1)), (60, (10, 5)), (600, (MAX_ROUNDS, 5)), (10**6, (MAX_ROUNDS, 20))],
)
def test_more_rounds_come_before_longer_ones(turns: int, expected: tuple[int, int]) -> None:
    assert plan(turns) == expected


@pytest.mark.gpu
def test_torch_waits_for_the_gpu() -> None:
    """A large product takes long on any GPU; a timer that did not wait would see microseconds."""
    layer = nn.Linear(8192, 8192, device="cuda").eval()
    work = nn.Sequential(*[layer] * 50)
    found = TorchTimer()([work], torch.zeros(1, 1, 4096, 8192, device="cuda"), seconds=0.5)
    flops = 50 * 2 * 4096 * 8192**2
    fastest = min(float(runs.min()) for runs in found[0]) / 1000
    assert flops / fastest < 2e15, "faster than any GPU there is"
