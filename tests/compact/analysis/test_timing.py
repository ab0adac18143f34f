"""Times of blocks: with a timer whose times are known, and PyTorch's."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from eps_compact.analysis import importance
from eps_compact.analysis.importance import (
    Measure,
    TorchTimer,
    block_times,
    branch_costs,
    plain,
)
from eps_core.timing import MIN_BLOCKS, Runs
from eps_train.data import dataset
from eps_train.gating import rewriting
from eps_train.gating.gate import EpsilonGate
from eps_train.models.cifar import CifarResNet


class LayerTimer:
    """A millisecond for each convolution, and as much again for one of more than 8 channels."""

    name = "a millisecond a convolution"

    def __init__(self) -> None:
        self.calls: list[Sequence[Collection[str]]] = []

    def load(self, model: fx.GraphModule, image: Tensor) -> Measure:
        assert image.dtype == torch.uint8

        def measure(without: Sequence[Collection[str]]) -> list[Runs]:
            self.calls.append(without)
            return [np.full((4, 3), self._time(plain(model, blocks))) for blocks in without]

        return measure

    def _time(self, network: nn.Module) -> float:
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        return sum(1.0 + (m.out_channels > 8) for m in convolutions)


def test_each_kind_is_timed_once_and_shared_out() -> None:
    model = rewriting.trace(CifarResNet(depth=20, width=4).eval())
    timer = LayerTimer()
    measure = timer.load(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    times = block_times(branch_costs(model, (3, 32, 32)), measure)
    (without,) = timer.calls
    assert len(without) == 1 + 6, "the whole network, and one without each kind"
    assert {b: t.value for b, t in times.items()} == {
        b: 4.0 if b.startswith("stages.2") else 2.0 for b in rewriting.gates(model)
    }
    assert all(t.low == t.value == t.high for t in times.values())


def test_what_is_timed_is_what_ships() -> None:
    model = rewriting.trace(CifarResNet(depth=8, width=4).eval())
    shipped = plain(model, ["stages.1.0"])
    assert not any(isinstance(module, EpsilonGate) for module in shipped.modules())
    assert not rewriting.taps(shipped)
    assert shipped.get_parameter("classifier.weight") is model.get_parameter("classifier.weight")


def test_torch_times_every_network_as_often_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even without any time, a few blocks are made; threads and network are as before."""
    monkeypatch.setattr(importance, "SECONDS_EACH", 0.0)
    threads = torch.get_num_threads()
    model = rewriting.trace(CifarResNet(depth=8, width=4, in_channels=1).eval())
    before = dict(model.named_modules())
    timer = TorchTimer(dataset.load("digits").identity)
    measure = timer.load(model, torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    found = measure([(), ("stages.1.0",)])
    assert [len(blocks) for blocks in found] == [MIN_BLOCKS, MIN_BLOCKS]
    assert all((runs > 0).all() for blocks in found for runs in blocks)
    assert torch.get_num_threads() == threads
    assert dict(model.named_modules()) == before
    assert "torch" in timer.name


@pytest.mark.gpu
def test_torch_waits_for_the_gpu() -> None:
    """A large product takes long on any GPU; a timer that did not wait would see microseconds."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8192, 8192)

        def forward(self, images: Tensor) -> Tensor:
            rows = images.reshape(4096, 8192)
            for _ in range(50):
                rows = self.layer(rows)
            return rows

    model = rewriting.trace(Products().eval()).to("cuda")
    image = torch.zeros(1, 1, 4096, 8192, dtype=torch.uint8, device="cuda")
    measure = TorchTimer(dataset.load("digits").identity).load(model, image)
    (rounds,) = measure([()])
    flops = 50 * 2 * 4096 * 8192**2
    fastest = float(rounds.min()) / 1000
    assert flops / fastest < 2e15, "faster than any GPU there is"
