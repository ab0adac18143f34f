"""Which additions get a gate, and which of their operands is the branch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eps_core.errors import GraphError
from eps_train.gating import rewriting
from eps_train.gating.gate import EpsilonGate

Forward = Callable[[Any, Tensor], Tensor]


class Network(nn.Module):
    """A few layers, and a forward pass that the test writes."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.one, self.two, self.wide = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.narrow = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.bias = nn.Parameter(torch.ones(4))
        self.scale = nn.Parameter(torch.full((4,), 0.5))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def x() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def branches(forward: Forward) -> list[str]:
    """The code of each gate's branch operand, after a check that nothing else has changed."""
    torch.manual_seed(0)
    model = Network(forward)
    expected = model(x())
    gated = rewriting.insert_gates(model)
    assert torch.equal(gated(x()), expected)
    modules = dict(gated.named_modules())
    return [
        str(node.args[1])
        for node in gated.graph.nodes
        if node.op == "call_module" and isinstance(modules[node.target], EpsilonGate)
    ]


def in_place(n: Any, x: Tensor) -> Tensor:
    out: Tensor = n.one(x)
    out += x
    return out


ADDITIONS: list[Forward] = [
    lambda n, x: x + n.one(x),
    lambda n, x: n.one(x) + x,
    lambda n, x: torch.add(x, n.one(x)),
    lambda n, x: torch.add(x, other=n.one(x)),
    lambda n, x: torch.add(input=n.one(x), other=x),
    lambda n, x: x.add(n.one(x)),
    lambda n, x: n.one(x).add(x),
    lambda n, x: n.one(x).add_(x),
    in_place,
    lambda n, x: torch.add(x, n.one(x), alpha=1),
    lambda n, x: n.norm(x) + n.one(n.norm(x)),
]


@pytest.mark.parametrize("forward", ADDITIONS)
def test_every_way_to_add(forward: Forward) -> None:
    assert branches(forward) == ["one"]


@pytest.mark.parametrize(
    ("forward", "branch"),
    [
        (lambda n, x: n.one(x) + n.two(n.norm(x).relu()), "two"),  # more layers
        (lambda n, x: n.two(n.norm(x).relu()) + n.one(x), "two"),
        (lambda n, x: n.one(x) + n.narrow(x), "one"),  # as many layers, more parameters
        (lambda n, x: n.narrow(x) + n.one(x), "one"),
        (lambda n, x: x + n.scale * n.one(x), "mul"),  # a learned scale belongs to its branch
        (lambda n, x: x + n.scale * x, "mul"),
        (lambda n, x: x.relu() + n.one(x), "one"),
    ],
)
def test_the_operand_with_more_weight_is_the_branch(forward: Forward, branch: str) -> None:
    assert branches(forward) == [branch]


def test_an_identity_is_the_shortcut_however_much_lies_beside_it() -> None:
    """Two branches on one shortcut: of `x + heavy` and `light`, `light` is the branch."""
    found = branches(lambda n, x: (x + n.two(n.one(x).relu())) + n.narrow(x))
    assert found == ["two", "narrow"]


def test_blocks_one_after_another_and_inside_each_other() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        inner = n.one(x)
        inner = inner + n.two(inner)
        x = x + n.wide(inner)
        out: Tensor = x + n.narrow(x)
        return out

    assert branches(forward) == ["two", "wide", "narrow"]


NOT_RESIDUAL: list[Forward] = [
    lambda n, x: n.one(x) + 1,
    lambda n, x: 1 + n.one(x),
    lambda n, x: n.one(x) + n.bias,
    lambda n, x: n.bias + n.one(x),
    lambda n, x: x + n.norm.weight * n.bias,
    lambda n, x: x + x,
    lambda n, x: x + x.relu(),
    lambda n, x: n.one(x) + n.two(x),  # neither is a shortcut of the other
    lambda n, x: n.one(x) - x,  # the shortcut would change its sign
    lambda n, x: x + n.bias.view(1, 4).expand(x.shape[0], 4),  # of the input its size alone
    lambda n, x: n.one(x).reshape(n.one(x).shape[0] + n.two(n.norm(x)).shape[0] - 3, 4),
    lambda n, x: n.one(x).reshape(n.one(x).size(0) * 1 + n.two(n.norm(x)).size(0) - 3, 4),
]


@pytest.mark.parametrize("forward", NOT_RESIDUAL)
def test_other_additions_are_left_alone(forward: Forward) -> None:
    with pytest.raises(GraphError, match=r"^Network: has no residual addition .*take out"):
        rewriting.insert_gates(Network(forward))
    assert branches(lambda n, x: (y := forward(n, x)) + n.wide(n.norm(y))) == ["wide"]


def test_who_reads_a_tensor_after_an_addition_in_place_sees_the_sum() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        branch = n.one(x)
        before = branch * 2
        branch.add_(x)
        after = n.two(branch)
        out: Tensor = before + branch.relu() * after
        return out

    model = Network(forward)
    gated = rewriting.insert_gates(model)
    assert torch.equal(gated(x()), model(x()))
    assert len(rewriting.gates(gated)) >= 1
    left = rewriting.drop_gates(gated)
    assert torch.equal(left(x()), model(x()))
    assert torch.equal(model(x()), model(x()))


def test_who_holds_the_same_tensor_by_an_identity_sees_the_sum_too() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        kept = n.one(x)
        shortcut = n.pass_on(kept)
        shortcut += n.two(n.norm(shortcut))
        out: Tensor = kept * shortcut.relu() * n.pass_on(kept)
        return out

    model = Network(forward)
    model.pass_on = nn.Identity()
    gated = rewriting.insert_gates(model)
    assert len(rewriting.gates(gated)) == 1
    assert torch.equal(gated(x()), model(x()))
