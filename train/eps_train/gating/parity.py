"""Parity check of a gated network against the network that it was made from.

The graph alone does not show what tracing lost, so both networks run, with open gates: two batches
in training and two in evaluation mode, and one backward pass in each mode, from the same random
state. Outputs, gradients, buffers and the set of trained parameters must be equal; in evaluation
mode, weights of two and more dimensions get no gradient, which saves time. Additions in another
order may differ by rounding; networks that are not equal are compared again in float64,
within a tolerance.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from eps_core.errors import GraphError, one_line
from eps_train.gating.gate import EpsilonGate
from eps_train.gating.tracing import unmoved_random

BATCH = 2  # batch norm in training needs more than one sample
SIDE = 48  # pixels; a difference does not depend on the image size, and small images are fast
_TOLERANCE = 1e-7  # in float64, relative to the largest magnitude of a tensor
_TOLERANCE_32 = 1e-3  # for networks that do not run in float64
_FLOOR = 1e-6  # of the largest gradient; a gradient below it is rounding (a bias before a norm)
_REMEDY = "torch.fx loses part of its forward(); move that part into a module of its own"


def refuse_difference(
    model: nn.Module,
    gated: fx.GraphModule,
    example: Tensor,
    prepare: Callable[[fx.GraphModule], None] = lambda gated: None,
) -> None:
    """Raise GraphError with the first difference between a network and its gated graph.

    Args:
        model: the original network, not on the meta device; not modified.
        gated: the graph with gates; compared with its gates open, and not modified.
        example: a batch of at least 2 inputs; floating-point values are replaced by random ones.
        prepare: called with the copy of `gated` before it runs; registers hooks, for example.
    """
    name = type(model).__name__
    try:
        original, opened = _copies(model, gated)
        prepare(opened)
        found = _difference(original, opened, example, tolerance=0.0)
        if found is not None:
            found = _beyond_rounding(model, gated, example)
    except _DoesNotRun as error:
        raise GraphError(f"{name}: {error}") from error.__cause__
    if found is not None:
        raise GraphError(f"{name}: with open gates, {found}; {_REMEDY}")


def _copies(model: nn.Module, gated: fx.GraphModule) -> tuple[nn.Module, fx.GraphModule]:
    opened = copy.deepcopy(gated)
    for module in opened.modules():
        if isinstance(module, EpsilonGate):
            module.set_epsilon(0.0)
    return copy.deepcopy(model), opened


def _beyond_rounding(model: nn.Module, gated: fx.GraphModule, example: Tensor) -> str | None:
    if example.is_floating_point():
        wide, opened = _copies(model, gated)
        with suppress(_DoesNotRun):  # its code casts to float32
            return _difference(
                wide.double(), opened.double(), example.double(), tolerance=_TOLERANCE
            )
    return _difference(*_copies(model, gated), example, tolerance=_TOLERANCE_32)


def _same(one: Tensor, other: Tensor, tolerance: float, floor: Callable[[], float]) -> bool:
    """Whether two tensors are equal, within a tolerance relative to their largest magnitude.

    `floor` returns the least magnitude to compare with; it is called only if needed.
    """
    if one.shape != other.shape or not tolerance or not one.is_floating_point():
        return torch.equal(one, other)
    apart = one.ne(other) & ~(one.isnan() & other.isnan())
    if not apart.any():
        return True
    largest = one[one.isfinite()].abs().max().item() if one.isfinite().any() else 0.0
    return bool((one - other)[apart].abs().max() <= tolerance * max(largest, floor()))


def example_for(model: nn.Module, shape: tuple[int, ...] | None = None) -> Tensor | None:
    """Return a batch of zeros on which `model` runs, or None where none is found.

    Images of at most `SIDE` pixels are tried first, then `shape`, the shape of one input. Without
    `shape`, shapes are guessed from the first layer.
    """
    if any(p.is_meta for p in model.parameters()):
        return None
    if shape is None:
        shapes = _guesses(model)
    else:
        shapes = [(*shape[:1], *(min(n, SIDE) for n in shape[1:])), shape]
    for guess in dict.fromkeys(shapes):
        example = torch.zeros((BATCH, *guess))
        with suppress(Exception):  # the user's forward() may raise anything; try the next shape
            dry_run(model, example)
            return example
    return None


def dry_run(
    model: nn.Module,
    example: Tensor,
    prepare: Callable[[Any], None] = lambda network: None,
    *,
    training: bool = True,
) -> Any:
    """Return the output of a copy of `model` for zeros of `example`'s shape.

    Exceptions of the forward pass are not caught.

    Args:
        prepare: called with the copy before it runs; registers hooks, for example.
    """
    network = copy.deepcopy(model).train(training)
    prepare(network)
    device = next((parameter.device for parameter in model.parameters()), example.device)
    with torch.no_grad(), unmoved_random():
        return network(torch.zeros_like(example, device=device))


def _guesses(model: nn.Module) -> list[tuple[int, ...]]:
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            return [(layer.in_channels, side, side) for side in (SIDE, 32, 28, 224)]
        if isinstance(layer, nn.Conv1d):
            return [(layer.in_channels, SIDE)]
        if isinstance(layer, nn.Linear):
            return [(layer.in_features,), (8, layer.in_features)]
    return []


class _DoesNotRun(Exception):
    """One of the networks does not run."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """Results of one forward and backward pass."""

    mode: str
    modes: dict[str, bool]
    outputs: list[Tensor]
    trains: bool  # whether the backward pass was made
    gradients: dict[str, Tensor | None]  # by the first name of each parameter
    buffers: dict[str, Tensor]

    def floor(self) -> float:
        """Return the magnitude below which a difference of gradients is rounding."""
        gradients = [g for g in self.gradients.values() if g is not None and g.numel()]
        return _FLOOR * max((g.abs().max().item() for g in gradients), default=0.0)


def _difference(
    model: nn.Module, gated: fx.GraphModule, example: Tensor, *, tolerance: float
) -> str | None:
    """Describe the first difference between two networks, both of which are modified."""
    known = _Names(model)
    present = {name for name, _ in gated.named_parameters(remove_duplicate=False)}
    original, rewritten = _passes(model, known, example), _passes(gated, known, example)
    while True:
        try:
            expected = next(original, None)
        except Exception as error:  # the user's forward() may raise anything
            shape = "x".join(map(str, example.shape[1:]))
            raise _DoesNotRun(f"does not run on inputs of {shape} ({one_line(error)})") from error
        if expected is None:
            return None
        try:
            found = next(rewritten)
        except Exception as error:
            raise _DoesNotRun(
                f"its graph does not run on these inputs ({one_line(error)}); {_REMEDY}"
            ) from error
        if reason := _compare(expected, found, known, present, tolerance):
            return f"{reason} in {expected.mode}"


class _Names:
    """All names of each parameter and buffer of a network, and the buffers' initial values."""

    def __init__(self, model: nn.Module) -> None:
        buffers = dict(model.named_buffers(remove_duplicate=False))
        same = _names_by_tensor(buffers.items())
        self.parameters = list(
            _names_by_tensor(model.named_parameters(remove_duplicate=False)).values()
        )
        self.buffers = {name: same[id(buffer)] for name, buffer in buffers.items()}
        self.before = {name: buffer.clone() for name, buffer in buffers.items()}
        self.layers = {n for n, m in model.named_modules() if not list(m.children())}


def _names_by_tensor(named: Iterable[tuple[str, Tensor]]) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
    return names


def _passes(network: nn.Module, known: _Names, example: Tensor) -> Iterator[_Pass]:
    parameters = dict(network.named_parameters(remove_duplicate=False))
    device = next((parameter.device for parameter in parameters.values()), example.device)
    for training in (True, False):
        network.train(training)
        for batch in range(2):
            network.zero_grad()
            with unmoved_random(), torch.enable_grad():
                _seed(batch)
                source = example.to(device)
                if example.is_floating_point():
                    source = torch.randn(example.shape).to(device, example.dtype).requires_grad_()
                result = network(source.clone())
                outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
                _seed(batch)
                parts = [(x * torch.randn_like(x)).sum() for x in outputs if x.requires_grad]
                leaves = [source, *network.parameters()]
                if not training:  # a layer is reached through its bias; weights take longest
                    leaves = [leaf for leaf in leaves if leaf is source or leaf.dim() < 2]
                trains = training == (not batch) and _backward(parts, leaves)
            gradients = {"the input": source.grad}
            for names in known.parameters:
                parameter = next((parameters[name] for name in names if name in parameters), None)
                gradients[names[0]] = None if parameter is None else parameter.grad
            yield _Pass(
                mode="training" if training else "evaluation",
                modes={name: module.training for name, module in network.named_modules()},
                outputs=[x.detach() for x in outputs],
                trains=trains,
                gradients=gradients,
                buffers=dict(network.named_buffers(remove_duplicate=False)),
            )


def _backward(parts: list[Tensor], leaves: list[Tensor]) -> bool:
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    try:
        if parts and asked:
            torch.stack([part.to(torch.float64) for part in parts]).sum().backward(inputs=asked)
    except RuntimeError:  # a tensor that autograd needs was overwritten
        return False
    return True


def _compare(
    expected: _Pass, found: _Pass, known: _Names, present: set[str], tolerance: float
) -> str | None:
    for name, mode in found.modes.items():
        # The modules that were traced through have no mode of their own in the graph.
        if name in expected.modes and expected.modes[name] != mode and name in known.layers:
            return f"{name} has another mode, because your network overrides train(),"
    if len(expected.outputs) != len(found.outputs):
        return "the number of outputs differs"
    for index, (output, other) in enumerate(zip(expected.outputs, found.outputs, strict=True)):
        if not _same(output, other, tolerance, float):
            return f"output {index} differs{_amount(output, other)}"
    compared = [["the input"], *known.parameters] if expected.trains else []
    if expected.trains and not found.trains:
        return "a tensor that autograd needs is overwritten"
    for names in compared:
        wanted, got = expected.gradients[names[0]], found.gradients[names[0]]
        if wanted is not None and got is None:
            if names[0] == "the input" or present.intersection(names):
                return f"{names[0]} receives no gradient, unlike in your network,"
            return (
                f"{names[0]} is not trained, unlike in your network, because its module is only"
                " reached through a closure or a list,"
            )
        if got is not None and wanted is None:
            return f"{names[0]} receives a gradient, unlike in your network,"
        if (
            wanted is not None
            and got is not None
            and not _same(wanted, got, tolerance, expected.floor)
        ):
            return f"the gradient of {names[0]} differs{_amount(wanted, got)}"
    for name, buffer in expected.buffers.items():
        here = next((n for n in known.buffers.get(name, [name]) if n in found.buffers), None)
        # A buffer that the graph does not have must have kept its initial value.
        other = known.before.get(name, buffer) if here is None else found.buffers[here]
        if not _same(buffer, other, tolerance, float):
            return f"the buffer {name} differs{_amount(buffer, other)}"
    return None


def _amount(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape or not one.is_floating_point():
        return ""
    return f" (by up to {(one - other).abs().max().item():.2g}, of {one.abs().max().item():.2g})"


def _seed(seed: int) -> None:
    # `torch.manual_seed` takes milliseconds on a machine without a GPU.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy.random"):
        numpy.seed(seed)
