"""The two modes of a network, training and evaluation, in one graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate


class ModesDiffer(Exception):
    """The two modes' graphs have different structures; its argument is the first node that does."""


class ByMode(nn.Module):
    """A function whose constant arguments depend on the mode, in the place of its call.

    Calls `function(*args, **kwargs)` with `training` or with `evaluating`, each a pair of args and
    kwargs in which a :class:`Slot` stands for an operand.
    """

    def __init__(self, function: Any, training: Any, evaluating: Any) -> None:
        super().__init__()
        self.function = function
        self.calls = {True: training, False: evaluating}

    def forward(self, *operands: Any) -> Any:
        args, kwargs = map_aggregate(
            self.calls[self.training], lambda x: operands[x.index] if isinstance(x, Slot) else x
        )
        if isinstance(self.function, str):  # a method of the first argument
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        return str(getattr(self.function, "__name__", self.function))


class Slot:
    """The place of operand `index` in the arguments of a :class:`ByMode`."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"%{self.index}"


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in one mode, and afterwards as they were: their own `train()` is not asked."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = training
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def differing_calls(training: fx.Graph, evaluating: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The calls whose constants differ between the modes, each with its twin."""
    twins: dict[fx.Node, fx.Node] = {}
    differing: dict[fx.Node, fx.Node] = {}
    for node, twin in zip(training.nodes, evaluating.nodes, strict=True):
        twins[node] = twin
        same_inputs = [twins[n] for n in node.all_input_nodes] == twin.all_input_nodes
        if (node.op, node.target) != (twin.op, twin.target) or not same_inputs:
            raise ModesDiffer(node)
        if _arguments(node) != _arguments(twin):
            if node.op not in ("call_function", "call_method"):
                raise ModesDiffer(node)
            differing[node] = twin
    return differing


def _arguments(node: fx.Node) -> tuple[Any, list[int]]:
    """Constants of a call in their places, and which operand stands where."""
    order: list[int] = []

    def blank(value: fx.Node) -> Any:
        order.append(node.all_input_nodes.index(value))
        return None

    constants = repr(fx.node.map_arg((node.args, node.kwargs), blank))
    return constants, order


def by_mode(node: fx.Node, twin: fx.Node) -> ByMode:
    """What calls `node` of the training graph or its `twin` of the other, as the mode demands."""
    return ByMode(node.target, _call(node), _call(twin))


def _call(node: fx.Node) -> Any:
    slots = {n: Slot(i) for i, n in enumerate(node.all_input_nodes)}

    def slot(value: Any) -> Any:
        return slots[value] if isinstance(value, fx.Node) else value

    return map_aggregate((node.args, dict(node.kwargs)), slot)
