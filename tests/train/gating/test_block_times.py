"""Times of blocks: with a timer whose times are known, and PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eps_core.timing import MIN_BLOCKS
from eps_train.data import dataset
from eps_train.gating import costs, rewriting
from eps_train.gating.costs import (
    TorchTimer,
    block_times,
    branch_costs,
    count_costs,
    latency_share,
    measure_latency,
    plain,
)
from eps_train.gating.gate import EpsilonGate
from eps_train.gating.targets import Currency
from eps_train.models.resnets import CifarResNet
from eps_train.models.spec import cost
from tests.train.gating.timers import LayerTimer

IMAGE = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


def test_each_kind_is_timed_once_and_shared_out() -> None:
    model = rewriting.trace(CifarResNet(depth=20, width=4).eval())
    timer = LayerTimer()
    measure = timer.load(model, IMAGE)
    whole, times = block_times(branch_costs(model, (3, 32, 32)), measure)
    (without,) = timer.calls
    assert len(without) == 1 + 6, "the whole network, and one without each kind"
    assert whole.value == 1 + 6 * 2.0 + 3 * 4.0
    assert {b: t.value for b, t in times.items()} == pytest.approx(
        {b: 4.0 if b.startswith("stages.2") else 2.0 for b in rewriting.gates(model)}
    )
    assert all(t.low == t.value == t.high for t in times.values())


def test_the_costs_of_a_latency_are_the_times_of_call_and_blocks() -> None:
    model = rewriting.trace(CifarResNet(depth=8, width=4).eval())
    found = measure_latency(model, IMAGE, LayerTimer())
    blocks = {"stages.0.0": 2.0, "stages.1.0": 2.0, "stages.2.0": 4.0}
    assert (found.currency, found.whole) == ("latency", 9.0)
    assert found.blocks == pytest.approx(blocks)
    assert found.timer == LayerTimer.name


def test_blocks_add_up_to_what_all_of_them_save() -> None:
    """Here a block saves more beside others than alone."""

    class Cached(LayerTimer):
        def _time(self, network: nn.Module) -> float:
            return super()._time(network) ** 2

    model = rewriting.trace(CifarResNet(depth=14, width=4).eval())
    found = measure_latency(model, IMAGE, Cached())
    assert found.without(found.blocks) == pytest.approx(1.0)
    assert found.blocks["stages.2.1"] > found.blocks["stages.1.1"] > 0


def test_a_block_whose_time_is_lost_in_the_noise_saves_nothing() -> None:
    class Noise(LayerTimer):
        def _time(self, network: nn.Module) -> float:
            return 20.0 - super()._time(network)

    model = rewriting.trace(CifarResNet(depth=8, width=4).eval())
    found = measure_latency(model, IMAGE, Noise())
    assert set(found.blocks.values()) == {0.0}


@pytest.mark.parametrize("currency", ["parameters", "flops"])
def test_what_is_counted_is_what_the_network_has(currency: Currency) -> None:
    model = rewriting.trace(CifarResNet(depth=14, width=4))
    found = count_costs(model, (3, 16, 16), currency)
    assert found.whole == getattr(cost(model, (3, 16, 16)), currency)
    gone = ["stages.0.1", "stages.2.1"]
    less = cost(rewriting.remove_blocks(model, gone), (3, 16, 16))
    assert found.without(gone) == getattr(less, currency)


def test_the_share_of_a_latency() -> None:
    model = rewriting.trace(CifarResNet(depth=8, width=4).eval())
    measure = LayerTimer().load(model, IMAGE)
    assert latency_share(measure, ["stages.2.0"]).value == pytest.approx(5 / 9)


def test_what_is_timed_is_what_ships() -> None:
    model = rewriting.trace(CifarResNet(depth=8, width=4).eval())
    shipped = plain(model, ["stages.1.0"])
    assert not any(isinstance(module, EpsilonGate) for module in shipped.modules())
    assert not rewriting.taps(shipped)
    assert shipped.get_parameter("classifier.weight") is model.get_parameter("classifier.weight")


def test_torch_times_every_network_as_often_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even without any time, a few blocks are made; threads and network are as before."""
    monkeypatch.setattr(costs, "SECONDS_EACH", 0.0)
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
