"""Whatever the residual network and whichever of its blocks are dead: the logits stay equal."""

from __future__ import annotations

import contextlib
import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eps_compact import compact
from eps_train.gating import rewriting
from tests.compact.random_networks import Network, Plan, images, plans, silenced

EXAMPLES = settings(max_examples=40, derandomize=True)


@st.composite
def cases(draw: st.DrawFn, p: float = 0.5) -> tuple[Plan, list[str]]:
    """A network, and which of its blocks are dead."""
    plan = draw(plans(p))
    return plan, [name for name in plan.blocks if draw(st.booleans())]


def latched(gated: nn.Module, dead: list[str]) -> nn.Module:
    for name, gate in rewriting.gates(gated).items():
        if name in dead:
            gate.latch()
    return gated


@EXAMPLES
@given(case=cases(), training=st.booleans(), count=st.sampled_from([1, 3]))
def test_compact_networks_compute_what_silent_branches_leave(
    case: tuple[Plan, list[str]], training: bool, count: int
) -> None:
    plan, dead = case
    model = Network(plan)
    gated = rewriting.insert_gates(copy.deepcopy(model), epsilon=0.1)
    assert set(rewriting.gates(gated)) == set(plan.blocks)
    plain = compact(latched(gated, dead).train(training))
    expected = silenced(model, dead).eval()(images(count))
    assert torch.equal(gated.eval()(images(count)), expected)
    assert torch.equal(plain(images(count)), expected)
    again = compact(plain)
    assert again.code == plain.code
    assert torch.equal(again(images(count)), expected)
    for name in dead:
        assert not [key for key in plain.state_dict() if key.startswith(f"{name}.branch.")]


def trained(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of a step; no gradients where the network overwrites what they need."""
    out: Tensor = model(images())
    with contextlib.suppress(RuntimeError):
        out.square().sum().backward()
        return out.detach(), {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    return out.detach(), {}


@EXAMPLES
@given(case=cases(p=0.0), training=st.booleans())
def test_gates_and_removal_change_nothing_else_in_either_mode(
    case: tuple[Plan, list[str]], training: bool
) -> None:
    plan, dead = case
    model = Network(plan).train(training)
    open_gates = rewriting.insert_gates(copy.deepcopy(model))
    expected, gradients = trained(copy.deepcopy(model))
    found, ours = trained(open_gates)
    assert torch.equal(found, expected)
    # A gate adds to a new tensor, so that more networks can be trained with gates than without.
    assert all(torch.equal(ours[name], gradients[name]) for name in gradients)
    gated = rewriting.insert_gates(copy.deepcopy(model))
    left = rewriting.remove_blocks(copy.deepcopy(gated), dead)
    reference, gradients = trained(latched(gated, dead))
    found, ours = trained(left)
    assert torch.equal(found, reference)
    # The silent branches' zeros take part in sums, whose order shows in the last digits.
    for name in ours.keys() & gradients.keys():
        assert torch.allclose(ours[name], gradients[name], rtol=1e-3, atol=1e-5), name
    assert torch.equal(reference, silenced(model, dead)(images()))
    theirs = gated.state_dict()
    assert all(torch.equal(theirs[key], value) for key, value in left.state_dict().items())
