"""The two modes of a network, training and evaluation, in one graph."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Literal

from torch import fx, nn
from torch.fx.node import map_aggregate

Reading = Literal["never", "passed on", "decides"]

# Methods that are not part of a forward pass.
_NOT_FORWARD = frozenset({"__init__", "train", "eval", "extra_repr", "__repr__"})


class ModesDiffer(Exception):
    """The two modes' graphs have different structures."""


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


def reads_mode(kind: type[nn.Module]) -> Reading:
    """What the code of a module class does with `self.training`.

    "passed on": it is only ever an argument of a call (`F.dropout(x, p, self.training)`), so that
    the same steps run in both modes; "decides": anything else, or code without source.
    """
    found: Reading = "never"
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "torch" or base is object:
            continue
        for name, function in vars(base).items():
            if name in _NOT_FORWARD or not isinstance(function, FunctionType):
                continue
            if "training" not in _names(function.__code__):
                continue
            if not _only_passes_on(function):
                return "decides"
            found = "passed on"
    return found


def _names(code: Any) -> set[str]:
    inner = [constant for constant in code.co_consts if inspect.iscode(constant)]
    return set(code.co_names).union(*map(_names, inner))


def _only_passes_on(function: FunctionType) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return False
    passed = {
        id(argument)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
    }
    readings = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "training")
    return all(id(reading) in passed for reading in readings)


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
    if len(training.nodes) != len(evaluating.nodes):
        raise ModesDiffer
    twins: dict[fx.Node, fx.Node] = {}
    differing: dict[fx.Node, fx.Node] = {}
    for node, twin in zip(training.nodes, evaluating.nodes, strict=True):
        twins[node] = twin
        same_inputs = [twins[n] for n in node.all_input_nodes] == twin.all_input_nodes
        if (node.op, node.target) != (twin.op, twin.target) or not same_inputs:
            raise ModesDiffer
        if _arguments(node) != _arguments(twin):
            if node.op not in ("call_function", "call_method"):
                raise ModesDiffer
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
