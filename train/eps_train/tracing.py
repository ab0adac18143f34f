"""From a network's forward pass to a `torch.fx` graph that still switches between its two modes.

Tracing runs `forward()` once, so whatever Python reads of `self.training` on the way is frozen into
the graph. Three things keep the graph true in both modes: modules that decide by their mode stay
whole; the forward pass is traced in either mode, and the two graphs must have the same structure;
a constant that differs between them (`training=` of `F.dropout`, say) becomes a :class:`ByMode`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from eps_train.errors import GraphError
from eps_train.gate import EpsilonGate
from eps_train.modes import ByMode, ModesDiffer, by_mode, differing_calls, in_mode, reads_mode
from eps_train.networks import Tap

_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


class _Proxy(fx.Proxy):
    """Records `x += y` as the step in place that it is: fx's own takes it for `x = x + y`.

    Whoever else holds that tensor sees the difference.
    """

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)

    def _in_place(self, step: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", step, (self, other), {})


class InPlaceTracer(fx.Tracer):
    """Records what is done in place as that; for the rest, fx's own."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Tracer(InPlaceTracer):
    """Keeps whole: gates, taps, single layers, and modules that decide by their mode."""

    def __init__(self, *, strict: bool) -> None:
        super().__init__()
        self.strict = strict  # whether modules that pass their mode on are kept whole too

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (EpsilonGate, Tap, ByMode)):
            return True
        if super().is_leaf_module(m, module_qualified_name) or _is_layer(m):
            return True
        reading = reads_mode(type(m))
        return reading == "decides" or (self.strict and reading == "passed on")


def trace(model: nn.Module, *, one_mode: bool = False) -> fx.GraphModule:
    """Return `model` as a graph over the same modules and tensors; a graph comes back as it is.

    Optional arguments of its `forward()` are fixed at their defaults. The modes of the modules are
    left as they were. With `one_mode` the graph need only be true in the mode that `model` is in.

    Raises:
        GraphError: the forward pass cannot be traced, or depends on the mode in a way that a graph
            cannot follow.
    """
    if isinstance(model, fx.GraphModule):
        return model
    name = type(model).__name__
    try:
        if one_mode:
            graph = _trace_once(_Tracer(strict=False), model)
            return fx.GraphModule(model, graph, name)
        try:
            return _trace_both(model, strict=False)
        except ModesDiffer:
            return _trace_both(model, strict=True)
    except ModesDiffer:
        raise GraphError(
            f"{name}: its forward() takes other paths in training than in evaluation;"
            " move what differs into a module of its own"
        ) from None
    except Exception as error:  # whatever the user's forward() raises on a proxy
        raise GraphError(
            f"{name}: torch.fx cannot trace it ({' '.join(str(error).split())}); remove control"
            " flow that depends on tensor values from its forward()"
        ) from error


def _is_layer(module: nn.Module) -> bool:
    """Whether it is one step of the network: nothing inside it can be a block of its own.

    That is a kind of torch's own layers (BatchNorm with an activation, say), or a module without
    children that has at most one weight (its forward pass may hold what fx cannot follow).
    """
    bases = (base for base in type(module).__mro__ if base not in _CONTAINERS)
    if any(base.__module__.startswith("torch.nn.modules") for base in bases):
        return True
    weights = sum(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    return not any(True for _ in module.children()) and weights < 2


def _trace_both(model: nn.Module, *, strict: bool) -> fx.GraphModule:
    with in_mode(model, True):
        tracer = _Tracer(strict=strict)
        graph = _trace_once(tracer, model)
    reads = any(
        reads_mode(type(module)) != "never"
        for path, module in model.named_modules()
        if module is model or not tracer.is_leaf_module(module, path)
    )
    if not reads:
        return fx.GraphModule(model, graph, type(model).__name__)
    with in_mode(model, False):
        evaluating = _trace_once(_Tracer(strict=strict), model)
    switched = differing_calls(graph, evaluating)
    traced = fx.GraphModule(model, graph, type(model).__name__)
    for node, twin in switched.items():
        _switch(traced, node, twin)
    if switched:
        traced.recompile()
    return traced


def _trace_once(tracer: fx.Tracer, model: nn.Module) -> fx.Graph:
    fixed = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is None or isinstance(parameter.default, (bool, int, float, str))
    }
    graph = tracer.trace(model, concrete_args=fixed or None)
    # fx keeps an input for each fixed argument, and a check of its value: neither is needed.
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.args]:
        if str(node.target).rpartition("_")[0] in fixed:
            doomed = [node]
            for member in doomed:
                doomed += member.users
            for member in reversed(doomed):
                graph.erase_node(member)
    return graph


def _switch(traced: fx.GraphModule, node: fx.Node, twin: fx.Node) -> None:
    module = by_mode(node, twin)
    path = free_name(traced, owner(node), "by_mode")
    module.training = traced.training
    traced.add_submodule(path, module)
    with traced.graph.inserting_before(node):
        replacement = traced.graph.call_module(path, tuple(node.all_input_nodes))
    replacement.meta = node.meta
    node.replace_all_uses_with(replacement)
    traced.graph.erase_node(node)


def owner(node: fx.Node) -> str:
    """Qualified name of the module whose `forward()` made the node; "" for the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values()))), "")
    return str(path)


def free_name(model: nn.Module, place: str, name: str) -> str:
    """`place.name`, or the first of `place.name2`, `place.name3`, ... that `model` has not got."""
    try:
        inner = model.get_submodule(place)
    except AttributeError:
        inner = nn.Module()
    count, candidate = 1, name
    while hasattr(inner, candidate):
        count += 1
        candidate = f"{name}{count}"
    return f"{place}.{candidate}" if place else candidate
