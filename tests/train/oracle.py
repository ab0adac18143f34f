"""A second opinion on removal: the eager network, with chosen additions turned into "branch is 0".

It knows nothing of graphs. A mode watches every addition that the network makes; which of them a
gate stands for is found by value, from what both networks compute when all gates are open.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, resolve_name

from eps_core.errors import GraphError
from eps_train.gating import rewriting

RELU_SCALE = 1e6  # L in the paper's construction

WATCHED = ("add", "__add__", "__radd__", "sub", "__sub__", "subtract", "addcmul", "lerp")
WRITING = ("add_", "__iadd__", "sub_", "__isub__", "subtract_", "addcmul_", "lerp_")


class _Additions(TorchFunctionMode):
    """Notes all additions, or has the one numbered so give its operand of that index."""

    def __init__(self, shortcuts: Mapping[int, int] | None = None) -> None:
        super().__init__()
        self.shortcuts, self.count = shortcuts, 0
        self.sums: list[tuple[list[Tensor], Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
        operands = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if name not in WATCHED + WRITING or len(operands) < 2:
            return func(*args, **kwargs)
        number, self.count = self.count, self.count + 1
        if self.shortcuts is None:
            before = [x.detach().clone() for x in operands]
            result = func(*args, **kwargs)
            self.sums.append((before, result.detach().clone()))
            return result
        if number not in self.shortcuts:
            return func(*args, **kwargs)
        shortcut = operands[self.shortcuts[number]]
        if name in WATCHED:
            return shortcut.clone()
        return shortcut if shortcut is operands[0] else operands[0].copy_(shortcut)


def seeded(network: nn.Module, example: Tensor, mode: Any = None) -> Tensor:
    torch.manual_seed(5)
    random.seed(5)
    with mode or nullcontext():
        logits: Tensor = network(example)
    return logits


def gate_sums(gated: fx.GraphModule, example: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Shortcut and result of every gate."""
    found = {}
    gated = copy.deepcopy(gated)
    for block, gate in rewriting.gates(gated).items():

        def note(_: Any, operands: Any, result: Tensor, block: str = block) -> None:
            found[block] = operands[0].detach().clone(), result.detach().clone()

        gate.register_forward_hook(note)
    with torch.no_grad():
        seeded(gated, example)
    return found


def additions_of(
    model: nn.Module, gated: fx.GraphModule, example: Tensor, training: bool
) -> dict[str, Any]:
    """The addition of each gate: its number, and the index of its shortcut."""
    watch = _Additions()
    with torch.no_grad():
        seeded(copy.deepcopy(model).train(training), example, watch)
    found: dict[str, Any] = {}
    for block, (shortcut, result) in gate_sums(gated.train(training), example).items():
        near = [
            (_apart(total, result) + _apart(operand, shortcut), number, index)
            for number, (operands, total) in enumerate(watch.sums)
            for index, operand in enumerate(operands)
        ]
        distance, *found[block] = min(near)
        assert distance < 1e-4, block
    return found


def _apart(one: Tensor, other: Tensor) -> float:
    """Largest difference, as a share of the largest magnitude."""
    if one.shape != other.shape:
        return math.inf
    return float((one - other).abs().max() / other.abs().max())


def judge(model: nn.Module, example: Tensor, *, seed: int = 0) -> int | str:
    """How many gates the network got, all of them sound, or why it was refused.

    Raises AssertionError for a removal that differs from this module's opinion.
    """
    try:
        gated = rewriting.insert_gates(copy.deepcopy(model), example=example)
    except GraphError as error:
        return str(error)
    chooser, draws = random.Random(seed), draws_random_numbers(model, example)
    trains = can_be_trained(model, example)
    modes = (False,) if draws else (True, False)
    where = {training: additions_of(model, gated, example, training) for training in modes}
    for dead in _dead_sets(list(where[False]), chooser):
        for training in modes:
            shortcuts = dict(where[training][block] for block in dead)
            eager = copy.deepcopy(model).train(training)
            left = rewriting.remove_blocks(copy.deepcopy(gated), dead).train(training)
            expected = seeded(eager, example, _Additions(shortcuts))
            found = seeded(left, example)
            assert close(expected, found), ("output", training, dead)
            if trains:
                expected.square().sum().backward()
                found.square().sum().backward()
                _assert_same_gradients(eager, left, (training, dead))
            _assert_same_buffers(eager, left, (training, dead))
    return len(where[False])


def close(one: Tensor, other: Tensor) -> bool:
    """Equal but for the order of a sum: a factor of an addition becomes a step of its own."""
    scale = one.abs().max().item()
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-4 * scale)


def _assert_same_gradients(eager: nn.Module, left: nn.Module, where: Any) -> None:
    theirs = dict(eager.named_parameters(remove_duplicate=False))
    scale = max(p.grad.abs().max().item() for p in theirs.values() if p.grad is not None)
    for name, parameter in left.named_parameters():
        one, other = theirs[name].grad, parameter.grad
        one = torch.zeros_like(parameter) if one is None else one
        other = torch.zeros_like(parameter) if other is None else other
        assert (one - other).abs().max() <= 1e-4 * scale, (name, where)


def _assert_same_buffers(eager: nn.Module, left: nn.Module, where: Any) -> None:
    buffers = dict(eager.named_buffers(remove_duplicate=False))
    for name, buffer in left.named_buffers():
        if name in buffers:
            assert torch.allclose(buffers[name].float(), buffer.float(), rtol=1e-4), (name, where)


def can_be_trained(model: nn.Module, example: Tensor) -> bool:
    """False where it overwrites what autograd needs, as some that are only used may."""
    try:
        copy.deepcopy(model).train()(example).sum().backward()
    except RuntimeError:
        return False
    return True


def draws_random_numbers(model: nn.Module, example: Tensor) -> bool:
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    copy.deepcopy(model).train()(example)
    return not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate()


def _dead_sets(blocks: list[str], chooser: random.Random) -> Iterator[list[str]]:
    yield blocks
    if len(blocks) > 1:
        yield chooser.sample(blocks, len(blocks) // 2)
        yield chooser.sample(blocks, 1)


def relu_gate(branch: Tensor, epsilon: float) -> Tensor:
    """Compute `S(branch)` by the paper's construction from four ReLUs.

    `s = max_i(relu(F_i - eps) + relu(-F_i - eps))`, `w = relu(1 - L relu(1 - L s))`, `S(F) = w F`.
    Equal to the threshold except for responses in (epsilon, epsilon + 1/L), where `w` is a ramp.
    """
    excess = (torch.relu(branch.float() - epsilon) + torch.relu(-branch.float() - epsilon)).amax()
    weight = torch.relu(1 - RELU_SCALE * torch.relu(1 - RELU_SCALE * excess))
    return weight.to(branch.dtype) * branch
