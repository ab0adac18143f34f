"""A removed block leaves a tensor that others read, whatever the next step does to its operand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eps_train.gating import rewriting
from eps_train.gating.gate import EpsilonGate

Step = Callable[[Any, Tensor], Tensor]


class Network(nn.Module):
    """`start` is read twice: by the block, and after it by the output."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(4, 4), EpsilonGate()
        self.relu, self.quiet = nn.ReLU(inplace=True), nn.ReLU()
        self.drop = nn.Dropout(0.0)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        start = x.sigmoid()  # its gradient is computed from its result
        out = self.gate(start, self.layer(start))
        return self.step(self, out) * start


def _minus(n: Any, x: Tensor) -> Tensor:
    x -= 1
    return x


WRITING: list[Step] = [
    lambda n, x: n.relu(x),
    lambda n, x: F.relu(x, inplace=True),
    lambda n, x: F.relu(x, True),
    lambda n, x: F.relu_(x - 0.5) + F.hardtanh(x, inplace=True),
    lambda n, x: x.mul_(2),
    lambda n, x: torch.relu_(x),
    _minus,
    lambda n, x: n.relu(n.drop(x)),
    lambda n, x: x.view(-1, 2).mul_(2).view(-1, 4),
    lambda n, x: x.flatten(0).mul_(2).reshape(x.shape),
]


def _statement(n: Any, x: Tensor) -> Tensor:
    x.add_(1)
    x.view(-1).mul_(2)
    return x


WRITING.append(_statement)
READING: list[Step] = [lambda n, x: n.quiet(x), lambda n, x: n.relu(x + 1), lambda n, x: x * 2]


def gradient(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-2, 2, 8).view(2, 4).requires_grad_()
    out = model(x)
    out.sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("step", [*WRITING, *READING])
def test_removal_in_front_of_any_step(step: Step) -> None:
    torch.manual_seed(0)
    model = Network(step)
    left = rewriting.remove_blocks(model, ["gate"])
    model.gate.latch()
    for expected, found in zip(gradient(model), gradient(left), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("step", READING)
def test_a_copy_is_made_only_where_it_is_needed(step: Step) -> None:
    code = rewriting.remove_blocks(Network(step), ["gate"]).code
    assert "clone" not in code
    assert "clone" in rewriting.remove_blocks(Network(WRITING[0]), ["gate"]).code


class Rectified(nn.Module):
    """The branch begins with a step in place, so the shortcut is rectified too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate, self.relu = nn.Linear(4, 4), EpsilonGate(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 3
        out: Tensor = self.gate(x, self.layer(self.relu(x)))
        return out


def test_a_removed_branch_still_does_to_its_shortcut_what_it_did() -> None:
    model = Rectified()
    left = rewriting.remove_blocks(model, ["gate"])
    model.gate.latch()
    for expected, found in zip(gradient(model), gradient(left), strict=True):
        assert torch.equal(expected, found)
    assert "layer.weight" not in left.state_dict()


class _Shifted(nn.Module):
    """Somebody's own layer, whose code alone says that it works in place."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return F.relu(x, inplace=True)


class _Gentle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + 1)


@pytest.mark.parametrize(("layer", "writes"), [(_Shifted(), True), (_Gentle(), False)])
def test_layers_of_somebodys_own_that_work_in_place(layer: nn.Module, writes: bool) -> None:
    model = Rectified()
    model.add_module("relu", layer)
    left = rewriting.remove_blocks(model, ["gate"])
    model.gate.latch()
    for expected, found in zip(gradient(model), gradient(left), strict=True):
        assert torch.equal(expected, found)
    assert ("relu" in left.code) == writes
    after = Network(lambda n, x: n.relu(x))
    after.add_module("relu", layer)
    assert ("clone" in rewriting.remove_blocks(after, ["gate"]).code) == writes


def test_dropout_in_place_at_the_start_of_a_branch() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gate = nn.Linear(4, 4), EpsilonGate()

        def forward(self, x: Tensor) -> Tensor:
            x = x * 3
            dropped = F.dropout(x, 1.0, training=self.training, inplace=True)
            out: Tensor = self.gate(x, self.layer(dropped))
            return out

    model = Dropping()
    left = rewriting.remove_blocks(model, ["gate"])
    model.gate.latch()
    x = torch.ones(2, 4)
    for training in (True, False):
        assert torch.equal(left.train(training)(x), model.train(training)(x))


def test_a_gate_between_needs_no_copy() -> None:
    class Two(Rectified):
        def __init__(self) -> None:
            super().__init__()
            self.second = EpsilonGate()

        def forward(self, x: Tensor) -> Tensor:
            x = self.gate(x, self.layer(x))
            x = self.second(x, self.layer(x))
            out: Tensor = self.relu(x)
            return out

    model = Two()
    assert "clone" not in rewriting.remove_blocks(model, ["gate"]).code
    assert "clone" in rewriting.remove_blocks(model, ["second"]).code
    assert "clone" in rewriting.remove_blocks(model, ["gate", "second"]).code


def test_steps_in_place_inside_a_removed_branch_go_with_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
            self.gate = EpsilonGate()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.gate(x, self.branch(x))
            return out

    left = rewriting.remove_blocks(Block(), ["gate"])
    assert [node.op for node in left.graph.nodes] == ["placeholder", "output"]
