"""The gate against the paper's own construction, and the habits that make it safe to train with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eps_train.gate import EpsilonGate, relu_gate, response

EPSILON = 2.5
SHAPES = [(1, 4, 5, 3), (128, 4, 2, 2)]
DTYPES = [torch.float32, torch.bfloat16]


def operands(
    shape: tuple[int, ...], dtype: torch.dtype, peak: float, *, channels_last: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Shortcut, branch whose largest magnitude is exactly `peak`, and a gradient to send back."""
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    shortcut, branch, gradient = (torch.randn(shape, generator=generator) for _ in range(3))
    branch = branch.clamp(-2, 2) * (0.9 * peak / 2)
    branch.view(-1)[-1] = -peak  # the last element, and negative: easy to overlook
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return (
        shortcut.to(dtype, memory_format=memory).requires_grad_(),
        branch.to(dtype, memory_format=memory).requires_grad_(),
        gradient.to(dtype, memory_format=memory),
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("peak", "closed"),
    [(0.3, True), (2.484375, True), (EPSILON, True), (2.515625, False), (9.0, False)],
)
def test_gate_is_the_four_relu_form(
    shape: tuple[int, ...], dtype: torch.dtype, peak: float, closed: bool, channels_last: bool
) -> None:
    shortcut, branch, gradient = operands(shape, dtype, peak, channels_last=channels_last)
    gate = EpsilonGate(EPSILON).train()
    out = gate(shortcut, branch)
    out.backward(gradient)
    got = (out.detach(), shortcut.grad, branch.grad)

    shortcut, branch, gradient = operands(shape, dtype, peak, channels_last=channels_last)
    expected = shortcut + relu_gate(branch, EPSILON)
    expected.backward(gradient)

    assert torch.equal(got[0], expected)
    for ours, theirs in zip(got[1:], (shortcut.grad, branch.grad), strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
    assert int(gate.closed_steps) == closed
    assert got[0].dtype == dtype


@pytest.mark.parametrize("steps", [3, 25, -1, -25])
def test_threshold_is_sharp_to_the_last_bit(steps: int) -> None:
    """Representable numbers right beside epsilon; the four ReLUs ramp within 1e-6 above it."""
    peak = torch.tensor(EPSILON)
    for _ in range(abs(steps)):
        peak = torch.nextafter(peak, torch.tensor(math.copysign(math.inf, steps)))
    branch = torch.tensor([[0.5, -float(peak)]])
    shortcut = torch.ones(1, 2)
    out = EpsilonGate(EPSILON).train()(shortcut, branch)
    assert torch.equal(out, shortcut + branch if steps > 0 else shortcut)
    if steps < 0 or steps > 10:  # 25 steps above are 6e-6: beyond the ramp
        assert torch.equal(out, shortcut + relu_gate(branch, EPSILON))


def test_one_loud_sample_opens_the_gate_for_the_whole_batch() -> None:
    branch = torch.full((8, 2, 3, 3), 0.1)
    branch[5, 1, 2, 0] = -3.0
    out = EpsilonGate(EPSILON).train()(torch.zeros(8, 2, 3, 3), branch)
    assert torch.equal(out, branch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nonfinite_response_is_never_hidden(poison: float, dtype: torch.dtype) -> None:
    gate = EpsilonGate(EPSILON).train()
    shortcut, branch = torch.zeros(2, 3, dtype=dtype), torch.full((2, 3), 0.1, dtype=dtype)
    gate(shortcut, branch)
    branch[1, 1] = poison
    out = gate(shortcut, branch)
    gate(shortcut, branch)
    assert not out[1, 1].isfinite()
    assert torch.equal(out.isfinite(), branch.isfinite())
    assert (int(gate.steps), int(gate.closed_steps), int(gate.finite_steps)) == (3, 1, 1)


def test_evaluation_opens_live_gates_and_shuts_dead_ones() -> None:
    shortcut, branch = torch.randn(4, 3), torch.randn(4, 3) * 0.01
    gate = EpsilonGate(EPSILON).eval()
    assert torch.equal(gate(shortcut, branch), shortcut + branch)
    gate.latch()
    assert torch.equal(gate(shortcut, branch), shortcut)
    assert int(gate.steps) == 0, "evaluation is no part of the training record"


def test_a_latched_gate_stays_shut_in_training_and_passes_no_gradient() -> None:
    shortcut = torch.randn(4, 3, requires_grad=True)
    branch = (torch.randn(4, 3) * 100).requires_grad_()
    gate = EpsilonGate(EPSILON).train()
    gate.latch()
    out = gate(shortcut, branch)
    out.sum().backward()
    assert torch.equal(out, shortcut)
    assert branch.grad is not None
    assert shortcut.grad is not None
    assert not branch.grad.any()
    assert torch.equal(shortcut.grad, torch.ones(4, 3))


def test_epsilon_zero_keeps_even_an_all_zero_branch_open() -> None:
    branch = torch.zeros(2, 3, requires_grad=True)
    gate = EpsilonGate(0.0).train()
    gate(torch.randn(2, 3), branch).sum().backward()
    assert branch.grad is not None
    assert torch.equal(branch.grad, torch.ones(2, 3))
    assert int(gate.closed_steps) == 0


def test_decision_is_made_in_float32() -> None:
    """In bfloat16, 2.51 would round up to 2.515625, and a response of that would close the gate."""
    branch = torch.tensor([[2.515625, 0.0]], dtype=torch.bfloat16)
    shortcut = torch.zeros_like(branch)
    with torch.autocast("cpu", torch.bfloat16):
        out = EpsilonGate(2.51).train()(shortcut, branch)
    assert torch.equal(out, branch)


def test_gate_trains_under_autocast() -> None:
    layer, gate = torch.nn.Linear(6, 6), EpsilonGate(1e-3).train()
    images = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = gate(images, layer(images))  # float32 shortcut, bfloat16 branch
        out.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0


def test_counters_hold_the_record_of_an_epoch() -> None:
    gate = EpsilonGate(EPSILON).train()
    for peak in (1.0, 7.5, 2.0, 0.5):
        gate(torch.zeros(1, 2), torch.tensor([[peak, -0.1]]))
    assert (int(gate.steps), int(gate.closed_steps), int(gate.finite_steps)) == (4, 3, 4)
    assert float(gate.peak) == 7.5
    gate.reset_record()
    assert (int(gate.steps), int(gate.closed_steps), float(gate.peak)) == (0, 0, 0.0)
    assert float(gate.epsilon) == EPSILON


def test_nothing_waits_for_the_device() -> None:
    """On the meta device there are no values: reading one on the host would raise."""
    gate = EpsilonGate(EPSILON).to("meta")
    operand = torch.empty(2, 3, 4, 4, device="meta", requires_grad=True)
    for mode in (True, False):
        gate.train(mode)(operand, operand).sum().backward()
    gate.latch()
    gate.reset_record()


def test_record_survives_saving() -> None:
    gate = EpsilonGate(EPSILON).train()
    gate(torch.zeros(1, 1), torch.ones(1, 1))
    gate.latch()
    other = EpsilonGate()
    other.load_state_dict(gate.state_dict())
    assert float(other.epsilon) == EPSILON
    assert bool(other.dead)
    assert int(other.closed_steps) == 1


@pytest.mark.parametrize("epsilon", [-1.0, math.nan, math.inf])
def test_impossible_epsilon(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon must be finite and at least 0"):
        EpsilonGate(epsilon)


@pytest.mark.parametrize("dtype", DTYPES)
def test_response_is_the_largest_magnitude_of_any_layout(dtype: torch.dtype) -> None:
    whole = torch.randn(3, 8, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    layouts = {
        "contiguous": whole,
        "channels last": whole.to(memory_format=torch.channels_last),
        "transposed": whole.transpose(1, 3),
        "strided": whole[:, ::2, 1:],
        "matrix": whole.flatten(1),
        "single": whole[:1, :1, :1, :1],
    }
    for name, tensor in layouts.items():
        found = response(tensor)
        assert found.dtype == torch.float32, name
        assert float(found) == float(tensor.float().abs().max()), name
