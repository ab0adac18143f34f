"""The plain network computes what the gated one did, and is a network of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from eps_compact import compact
from eps_core.errors import GraphError
from eps_train.gating import rewriting
from eps_train.gating.gate import EpsilonGate
from eps_train.models.resnets import Tap
from tests.checkpoints import make_checkpoint

BLOCKS = tuple(f"stages.{stage}.{block}" for stage in range(3) for block in range(3))


def gated(dead: frozenset[str] = frozenset()) -> fx.GraphModule:
    return make_checkpoint(dead=sorted(dead)).build_gated()


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@given(dead=st.frozensets(st.sampled_from(BLOCKS)), count=st.sampled_from([1, 2, 7, 32]))
@settings(max_examples=15, derandomize=True)
def test_logits_equal_those_of_the_gated_network(dead: frozenset[str], count: int) -> None:
    model = gated(dead)
    plain = compact(model)
    assert torch.equal(plain(images(count)), model.eval()(images(count)))
    for block in BLOCKS:
        weights = [name for name in plain.state_dict() if name.startswith(f"{block}.")]
        assert bool(weights) == (block not in dead)


def test_nothing_but_layers_is_left() -> None:
    plain = compact(gated(frozenset({"stages.1.1"})))
    assert isinstance(plain, fx.GraphModule)
    assert not any(isinstance(module, (EpsilonGate, Tap)) for module in plain.modules())
    assert not any(module.training for module in plain.modules() if not list(module.children()))
    assert not plain.training


@pytest.mark.parametrize("dead", [{"stages.1.0"}, {"stages.2.0"}, set(BLOCKS)])
def test_first_blocks_leave_their_shortcut(dead: set[str]) -> None:
    model = gated(frozenset(dead)).eval()
    plain = compact(model)
    odd = torch.randn(3, 1, 9, 13)
    assert torch.equal(plain(odd), model(odd))


def test_compacting_twice_changes_nothing() -> None:
    once = compact(gated(frozenset({"stages.0.0", "stages.2.2"})))
    twice = compact(once)
    assert twice.code == once.code
    assert list(twice.state_dict()) == list(once.state_dict())
    assert torch.equal(twice(images()), once(images()))


def test_the_source_is_left_as_it_was_and_shares_nothing() -> None:
    model = gated(frozenset({"stages.0.1"}))
    before = copy.deepcopy(model.state_dict())
    plain = compact(model)
    assert model.training
    assert len(rewriting.gates(model)) == 9
    expected = plain(images())
    model(images()).sum().backward()  # moves the batch norms' statistics
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(plain(images()), expected)
    model.load_state_dict(before)
    assert torch.equal(model.eval()(images()), expected)


def test_it_can_be_fine_tuned() -> None:
    plain = compact(gated(frozenset({"stages.0.1"}))).train()
    plain(images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())


def test_gradients_of_the_last_step_are_not_carried_along() -> None:
    model = gated()
    model(images()).sum().backward()
    assert all(parameter.grad is None for parameter in compact(model).parameters())


def test_named_blocks_go_besides_the_latched_ones() -> None:
    plain = compact(gated(frozenset({"stages.0.1"})), dead=["stages.2.1"])
    reference = compact(gated(frozenset({"stages.0.1", "stages.2.1"})))
    assert plain.code == reference.code
    assert torch.equal(plain(images()), reference(images()))


def test_unknown_names() -> None:
    with pytest.raises(GraphError, match=r"no gated block named stages\.4\.0"):
        compact(gated(), dead=["stages.4.0"])


class Own(nn.Module):
    """A user's network: no stages, a mode read in forward(), gates of any name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.add, self.gate = EpsilonGate(0.5), EpsilonGate(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(x, self.first(x))
        if self.training:
            x = x * 2
        out: Tensor = self.gate(x, self.second(x))
        return out


def test_any_module_with_gates() -> None:
    model = Own()
    model.add.latch()
    plain = compact(model)
    x = torch.randn(4, 6)
    assert torch.equal(plain(x), x + model.second(x))
    assert "first.weight" not in plain.state_dict()


def test_any_module_without_gates() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Dropout())
    x = torch.randn(4, 6)
    assert torch.equal(compact(model)(x), model.eval()(x))
