"""The digest tells one network's code from another's, and not one build from the next."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from eps_compact.artifact import difference, fingerprint
from eps_train.gating import rewriting


class Table(nn.Module):
    """A layer of a user's, kept whole, with a table that is not saved."""

    table: Tensor

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0, scale, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * self.table
        return x


class OtherTable(Table):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x - self.table
        return x


class Network(nn.Module):
    def __init__(self, table: nn.Module, *, slope: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(4, 4), nn.LayerNorm(4, eps=eps)
        self.relu, self.table, self.slope = nn.LeakyReLU(slope), table, 2 * slope

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.table(self.relu(self.norm(self.one(x))))
        return F.leaky_relu(out, self.slope)


def network(make: Callable[[], nn.Module]) -> fx.GraphModule:
    return rewriting.add_gates(make()).eval()


def usual() -> nn.Module:
    return Network(Table())


def test_builds_and_copies_of_one_network_are_the_same() -> None:
    told = json.loads(json.dumps(fingerprint(network(usual))))
    for other in (network(usual), copy.deepcopy(network(usual))):
        assert difference(other, told) is None


@pytest.mark.parametrize(
    "other",
    [
        lambda: Network(OtherTable()),
        lambda: Network(Table(), slope=0.2),
        lambda: Network(Table(), eps=1e-3),
        lambda: Network(nn.ReLU()),
    ],
)
def test_other_code_and_other_settings_are_another_network(
    other: Callable[[], nn.Module],
) -> None:
    reason = difference(network(other), fingerprint(network(usual)))
    assert reason == "the code of its network is not the code that was compacted"


def test_other_constants_are_another_network_but_not_those_rounded_otherwise() -> None:
    told = fingerprint(network(usual))
    assert difference(network(lambda: Network(Table(1.0 + 1e-7))), told) is None
    reason = difference(network(lambda: Network(Table(1.1))), told)
    assert reason == "the constant table.table of its network is not the one that was compacted"
