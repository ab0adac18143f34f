"""Costs of blocks, as targets count them."""

from __future__ import annotations

from typing import Any

import pytest

from eps_train import Flops, Parameters
from eps_train.gating import rewriting
from eps_train.gating.targets import BlockCosts
from eps_train.models.spec import NetworkSpec

SHAPE = (1, 8, 8)


@pytest.mark.parametrize("target", [Parameters(0.5), Flops(0.5)], ids=repr)
def test_the_cost_of_a_block_is_what_its_removal_saves(target: Any) -> None:
    model = NetworkSpec.parse("cifar:14x4", in_channels=1, classes=10).build()
    costs = target.costs(model, SHAPE)
    assert costs.whole == target.measure(model, SHAPE)
    assert list(costs.blocks) == list(rewriting.gates(model))
    for block in ("stages.0.1", "stages.1.0"):  # the latter changes the shape
        less = rewriting.remove_blocks(model, [block])
        assert target.measure(less, SHAPE) == costs.whole - costs.blocks[block]


def test_every_stage_keeps_its_cheapest_block() -> None:
    costs = BlockCosts(whole=100, blocks={"a": 10, "b": 20, "c": 30})
    assert costs.least({"a": "one", "b": "one", "c": "two"}) == 0.8
