"""The idioms of residual networks: each is gated soundly, or refused; none is silently another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.train.idioms import IDIOMS
from tests.train.oracle import judge

QUICK = (
    *("in place", "torch.add, alpha", "minus", "addcmul", "lerp", "stochastic depth", "assertion"),
    *("in place, held by a view", "no_grad", "broadcast, pooled", "position", "module that adds"),
    *("buffer that is written", "buffer that is replaced", "straight-through", "frozen norms"),
    *("warm-up by counting", "reached by a closure", "functional convolution", "tied weights"),
)
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in IDIOMS]


@pytest.mark.parametrize("name", NAMES)
def test_idiom(name: str) -> None:
    expected, make = IDIOMS[name]
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    before = copy.deepcopy(model.state_dict())
    found = judge(model, torch.randn(3, 3, 8, 8))
    assert found == expected if isinstance(found, int) else expected is None, found
    assert not isinstance(found, str) or "\n" not in found
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
