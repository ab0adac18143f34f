"""Taking blocks out equals latching their gates, and harms nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eps_core.errors import GraphError
from eps_train.gating import rewriting
from eps_train.gating.gate import EpsilonGate
from eps_train.gating.rewriting import branch_parameters
from eps_train.models.resnets import CifarResNet, Tap

BLOCKS = tuple(f"stages.{stage}.{block}" for stage in range(3) for block in range(3))
EPSILON = 2.35  # some gates of this network close at it, some do not


def network() -> CifarResNet:
    torch.manual_seed(0)
    model = CifarResNet(depth=20, width=4, in_channels=1)
    for gate in rewriting.gates(model).values():
        gate.set_epsilon(EPSILON)
    return model


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def latched(model: nn.Module, dead: frozenset[str]) -> nn.Module:
    model = copy.deepcopy(model)
    for block, gate in rewriting.gates(model).items():
        if block in dead:
            gate.latch()
    return model


def removed(model: nn.Module, dead: frozenset[str]) -> nn.Module:
    return rewriting.remove_blocks(copy.deepcopy(model), dead)


def assert_same_survivors(left: nn.Module, right: nn.Module) -> None:
    """Everything that `right` still has, buffers and gradients too, is what `left` has."""
    theirs, gradients = left.state_dict(), dict(left.named_parameters())
    for name, tensor in right.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    for name, parameter in right.named_parameters():
        expected = gradients[name].grad
        assert (parameter.grad is None) == (expected is None), name
        if parameter.grad is not None and expected is not None:
            assert torch.equal(parameter.grad, expected), name


@given(dead=st.frozensets(st.sampled_from(BLOCKS)))
@settings(max_examples=15, derandomize=True)
def test_removal_equals_latched_gates(dead: frozenset[str]) -> None:
    model = network()
    kept, left = latched(model, dead), removed(model, dead)
    for _ in range(2):  # the second step meets the first one's batch statistics
        expected, found = kept(images()), left(images())
        assert torch.equal(expected, found)
        for logits in (expected, found):
            logits.square().sum().backward()
    assert_same_survivors(kept, left)
    assert torch.equal(kept.eval()(images()), left.eval()(images()))
    assert tuple(rewriting.gates(left)) == tuple(block for block in BLOCKS if block not in dead)


def test_some_gates_close_in_this_network() -> None:
    model = network()
    model(images())
    closed = [int(gate.closed_steps) for gate in rewriting.gates(model).values()]
    assert 0 < sum(closed) < len(closed)


def test_weights_of_removed_branches_are_gone() -> None:
    left = rewriting.remove_blocks(network(), ["stages.1.0", "stages.2.2"])
    assert not any(name.startswith(("stages.1.0", "stages.2.2")) for name in left.state_dict())


@pytest.mark.parametrize("block", ["stages.1.0", "stages.2.0"])
def test_a_first_block_leaves_its_shortcut(block: str) -> None:
    left = rewriting.remove_blocks(network(), [block])
    assert left(torch.randn(2, 1, 9, 13)).shape == (2, 10)


def test_order_and_repetition_of_names_do_not_matter() -> None:
    names = ["stages.2.1", "stages.0.0", "stages.1.1"]
    one = rewriting.remove_blocks(network(), names)
    other = rewriting.remove_blocks(network(), [*reversed(names), names[0]])
    step = rewriting.remove_blocks(rewriting.remove_blocks(network(), names[:1]), names[1:])
    assert one.code == other.code
    assert list(one.state_dict()) == list(other.state_dict()) == list(step.state_dict())
    assert torch.equal(one.eval()(images()), other.eval()(images()))
    assert torch.equal(one(images()), step.eval()(images()))


def test_input_is_left_as_it_was_and_tensors_are_shared() -> None:
    model = rewriting.trace(network())
    before, code = copy.deepcopy(model.state_dict()), model.code
    left = rewriting.remove_blocks(model, ["stages.1.1"])
    assert model.code == code
    assert model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    theirs = dict(model.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in left.named_parameters())


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(training: bool) -> None:
    left = rewriting.remove_blocks(network().train(training), ["stages.0.1"])
    assert left.training == training
    leaves = [module for module in left.modules() if not list(module.children())]
    assert all(module.training == training for module in leaves)


def test_hooks_on_the_tap_survive_removal() -> None:
    model = network()
    seen: list[torch.Size] = []
    rewriting.taps(model)[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    left = rewriting.remove_blocks(model, ["stages.1.1"])
    left = rewriting.remove_blocks(left, ["stages.1.0", "stages.1.2"])
    left(images())
    assert seen == [(6, 8, 4, 4)]


def test_unknown_names_are_listed_beside_the_known_ones() -> None:
    with pytest.raises(GraphError) as error:
        rewriting.remove_blocks(network(), ["stages.0.0", "stages.9.9", "layer"])
    message = str(error.value)
    assert message.startswith("no gated block named layer, stages.9.9; the gated blocks are: ")
    assert all(block in message for block in BLOCKS)
    with pytest.raises(GraphError, match=r"the gated blocks are: none$"):
        rewriting.remove_blocks(nn.Linear(2, 2), ["a"])


def test_a_block_cannot_be_removed_twice() -> None:
    left = rewriting.remove_blocks(network(), ["stages.0.1"])
    with pytest.raises(GraphError, match=r"stages\.0\.1"):
        rewriting.remove_blocks(left, ["stages.0.1"])


def test_dropped_gates_are_plain_additions_in_both_modes() -> None:
    model = network()
    plain = rewriting.drop_gates(copy.deepcopy(model))
    assert not rewriting.gates(plain)
    assert not any("gate" in name for name in plain.state_dict())
    assert torch.equal(plain.eval()(images()), model.eval()(images()))
    for gate in rewriting.gates(model).values():
        gate.set_epsilon(0)  # held open
    assert torch.equal(plain.train()(images()), model.train()(images()))


def test_gates_to_keep() -> None:
    left = rewriting.drop_gates(network(), keep=["stages.2.0", "stages.0.2"])
    assert tuple(rewriting.gates(left)) == ("stages.0.2", "stages.2.0")


def test_gates_to_keep_may_come_from_any_iterable() -> None:
    names = ["stages.0.2", "stages.2.0"]
    assert list(rewriting.gates(rewriting.drop_gates(network(), keep=iter(names)))) == names


def test_dropped_taps() -> None:
    model = network().eval()
    left = rewriting.drop_taps(copy.deepcopy(model))
    assert not rewriting.taps(left)
    assert torch.equal(left(images()), model(images()))


class Backwards(nn.Module):
    """Somebody's own network: gates at the top, declared in another order than computed."""

    def __init__(self) -> None:
        super().__init__()
        self.last = EpsilonGate(1.0)
        self.gate = EpsilonGate(1.0)
        self.unused = EpsilonGate(1.0)
        self.tap = Tap(4)
        self.dropout = nn.Dropout(0.5)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tap(self.gate(x, self.one(x)))
        out: Tensor = self.last(self.dropout(x), self.two(x))
        return out


def test_gates_are_listed_as_computed() -> None:
    assert list(rewriting.gates(Backwards())) == ["gate", "last"]


def test_dropout_still_listens_to_the_mode() -> None:
    left = rewriting.remove_blocks(Backwards(), ["last"])
    x = torch.ones(64, 4)
    assert (left.train()(x) == 0).any()
    assert not (left.eval()(x) == 0).any()


def test_a_network_that_cannot_be_traced() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(GraphError, match=r"Branching: torch\.fx cannot trace it"):
        rewriting.trace(Branching())


def test_a_stage_is_a_row_of_blocks_whose_results_have_one_shape() -> None:
    found = rewriting.stages(rewriting.trace(network()), (1, 8, 8))
    assert found == {block: block.rpartition(".")[0] for block in BLOCKS}
    apart = rewriting.insert_gates(nn.Sequential(*(nn.Sequential(Lone()) for _ in range(4))))
    assert len(rewriting.gates(apart)) == 4
    assert len(set(rewriting.stages(apart, (4, 4, 4)).values())) == 1


class Lone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        torch._assert(out.shape[1] == 4, "four channels")
        total: Tensor = x + out
        return total


def test_an_assertion_goes_with_what_it_looks_at() -> None:
    model = rewriting.insert_gates(nn.Sequential(Lone(), Lone()))
    left = rewriting.remove_blocks(model, ["0"])
    assert not any(name.startswith("0.") for name in left.state_dict())
    assert branch_parameters(model) == dict.fromkeys("01", 4 * 4 * 9 + 4)


def test_names() -> None:
    assert rewriting.block_name("stages.0.3.gate") == "stages.0.3"
    assert rewriting.stage_name("stages.0.3") == "stages.0"


def test_a_stage_keeps_its_last_block() -> None:
    live = ["a.0", "a.1", "a.2", "b.0", "c.d.0", "c.d.1"]
    stages = dict(zip(live, ("a", "a", "a", "b", "c", "c"), strict=True))
    assert rewriting.removable(live, live, stages) == ["a.0", "a.1", "c.d.0"]
    assert rewriting.removable(reversed(live), live, stages) == ["c.d.1", "a.2", "a.1"]
    assert rewriting.removable(["a.2"], ["a.2"], stages) == []
