"""Nested sub-networks: prefixes of an order that share weights, each with its own statistics."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from eps_train.gating import rewriting
from eps_train.gating.nested import (
    SubNetworks,
    nested_order,
    reestimate_batchnorm,
    smallest_size,
)
from tests.train.gating.networks import gated

IMAGES = torch.randn(6, 3, 8, 8)
STAGES = {f"stages.{stage}.{block}": f"stages.{stage}" for stage in range(3) for block in range(3)}


def test_the_best_block_of_each_stage_comes_first() -> None:
    scores = {block: float(place) for place, block in enumerate(STAGES)}
    order = nested_order(scores, STAGES)
    assert order[:3] == ("stages.2.2", "stages.1.2", "stages.0.2")
    assert order[3:] == tuple(sorted(set(STAGES) - set(order[:3]), key=scores.get, reverse=True))  # type: ignore[arg-type]


def test_every_size_is_a_prefix_that_shares_its_weights() -> None:
    model = gated(seed=1)
    order = tuple(STAGES)[::-1]
    networks = SubNetworks(model, order, smallest=3)
    for count in range(3, 9):
        small = networks.keep(count)
        assert not rewriting.gates(small)
        assert not rewriting.taps(small)
        shared = dict(model.named_parameters())
        assert all(parameter is shared[name] for name, parameter in small.named_parameters())
        latched = copy.deepcopy(model)
        gates = rewriting.gates(latched)
        for block in order[count:]:
            gates[block].latch()
        assert torch.equal(small.eval()(IMAGES), latched.eval()(IMAGES))
        assert networks.keep(count) is small


def test_a_sub_network_has_the_mode_of_the_whole() -> None:
    model = gated().eval()
    networks = SubNetworks(model, tuple(STAGES), smallest=3)
    assert not networks.keep(4).training
    model.train()
    assert networks.keep(4).training


def test_sizes_follow_the_sandwich_rule() -> None:
    networks = SubNetworks(gated(), tuple(STAGES), smallest=3)
    torch.manual_seed(0)
    drawn = Counter(networks.draw() for _ in range(2000))
    assert set(drawn) == set(range(3, 9))
    assert drawn[3] == pytest.approx(500, abs=100)
    assert all(drawn[count] == pytest.approx(300, abs=100) for count in range(4, 9))


def test_one_sub_network_is_drawn_without_fail() -> None:
    networks = SubNetworks(gated(), tuple(STAGES), smallest=8)
    assert {networks.draw() for _ in range(20)} == {8}


def test_the_smallest_keeps_a_fifth_and_a_block_of_each_stage() -> None:
    assert smallest_size(STAGES) == 3
    assert smallest_size({str(block): str(block % 2) for block in range(50)}) == 10


def test_training_one_keeps_the_statistics_of_the_whole() -> None:
    model = gated(seed=2).train()
    model(IMAGES)
    before = {n: t.clone() for n, t in model.state_dict().items() if n.endswith(("mean", "var"))}
    networks = SubNetworks(model, tuple(STAGES), smallest=3)
    networks(IMAGES).square().mean().backward()
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    assert model.get_parameter("stem.0.weight").grad is not None


@pytest.mark.parametrize(
    ("order", "smallest", "error"),
    [
        (tuple(STAGES)[1:], 3, "every gated block"),
        ((*STAGES, "stages.0.0"), 3, "every gated block"),
        (tuple(STAGES), 9, "below 9"),
    ],
)
def test_what_is_no_order_is_refused(order: tuple[str, ...], smallest: int, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        SubNetworks(gated(), order, smallest=smallest)


def test_statistics_are_those_of_the_sub_network() -> None:
    """In training mode a batch norm uses the batch's own statistics; after that it has them."""
    model = gated(seed=2).train()
    for _ in range(3):
        model(IMAGES)
    small = copy.deepcopy(SubNetworks(model, tuple(STAGES), smallest=3).keep(4)).eval()
    before = small(IMAGES)
    reestimate_batchnorm(small, [IMAGES])
    assert not small.training
    norms = [m for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}
    assert not any(norm.training for norm in norms)
    after = small(IMAGES)
    # A running variance is that of N - 1, a batch's own of N: hence the tolerance.
    expected = copy.deepcopy(small).train()(IMAGES)
    assert torch.allclose(after, expected, rtol=0.05, atol=0.05)
    assert not torch.allclose(before, expected, rtol=0.05, atol=0.05)
    # The whole network's own are untouched.
    theirs = model.state_dict()
    here = small.state_dict()
    assert not any(torch.equal(theirs[n], here[n]) for n in here if n.endswith("running_mean"))


def test_statistics_are_the_mean_over_the_batches() -> None:
    norm = nn.BatchNorm2d(3).train()
    batches = [torch.randn(4, 3, 5, 5) + shift for shift in range(3)]
    reestimate_batchnorm(norm, batches)
    assert norm.running_mean is not None
    expected = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    assert torch.allclose(norm.running_mean, expected, atol=1e-6)
    assert norm.training
