"""Trace a network to a `torch.fx` graph that supports both training and evaluation mode.

Tracing runs `forward()` once, so whatever is not an operation on tensors is frozen into the graph
or lost. A module whose code would lose something that way is kept whole: it is one step of the
graph and runs its own code. Such modules are detected during the trace: they raise an exception,
draw a random number in Python, change a buffer or a counter, enter `torch.no_grad` or autocast,
call an `autograd.Function`, or take other steps in training than in evaluation. A call whose
constants differ between the modes (`training=` of `F.dropout`) becomes a :class:`ByMode`.
"""

from __future__ import annotations

import copy
import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from eps_core.errors import GraphError, one_line
from eps_train.gating.gate import EpsilonGate
from eps_train.models.resnets import Tap

# -- Training and evaluation mode in one graph


class ModesDiffer(Exception):
    """The graphs of the two modes differ in structure; the argument is the first such node."""


class ByMode(nn.Module):
    """Function call whose constant arguments depend on the mode.

    Args:
        function: a function, or the name of a method of the first argument.
        training: pair of args and kwargs of the call in training mode, with a :class:`Slot` in the
            place of each operand.
        evaluating: the same for evaluation mode.
    """

    def __init__(self, function: Any, training: Any, evaluating: Any) -> None:
        super().__init__()
        self.function = function
        self.calls = {True: training, False: evaluating}

    def forward(self, *operands: Any) -> Any:
        args, kwargs = map_aggregate(
            self.calls[self.training], lambda x: operands[x.index] if isinstance(x, Slot) else x
        )
        if isinstance(self.function, str):
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        return str(getattr(self.function, "__name__", self.function))


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of operand `index` in the arguments of a :class:`ByMode`."""

    index: int


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set all modules to one mode inside the block, without calling their own `train()`."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = training
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _differing_calls(training: fx.Graph, evaluating: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return the calls whose constants differ between the modes, each with its counterpart."""
    counterparts, differing = {}, {}
    for node, counterpart in zip(training.nodes, evaluating.nodes, strict=True):
        counterparts[node] = counterpart
        inputs = [counterparts[n] for n in node.all_input_nodes]
        same_step = (node.op, node.target) == (counterpart.op, counterpart.target)
        if not same_step or inputs != counterpart.all_input_nodes:
            raise ModesDiffer(node)
        if repr(_call(node)) != repr(_call(counterpart)):
            if node.op not in ("call_function", "call_method"):
                raise ModesDiffer(node)
            differing[node] = counterpart
    return differing


def _call(node: fx.Node) -> Any:
    """Return the arguments of a node as :class:`ByMode` takes them."""
    slots: dict[fx.Node, Any] = {n: Slot(i) for i, n in enumerate(node.all_input_nodes)}
    return map_aggregate(
        (node.args, dict(node.kwargs)), lambda x: slots[x] if isinstance(x, fx.Node) else x
    )


_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
KEPT = "kept whole"  # key of `GraphModule.meta`: names of the modules kept whole, and the reasons
OWN = "state"  # key of `GraphModule.meta`: names in the state dict of the original network
OTHER_STEPS = "takes other steps in training than in evaluation"
DRAWS = "draws random numbers in Python"
_REASON = 120  # most characters of an exception's message


class _Unfaithful(Exception):
    """The forward pass does something that a graph would lose."""


class _Proxy(fx.Proxy):
    """Proxy that records `x += y` as an in-place operation; that of fx records `x = x + y`.

    The two differ for other readers of the tensor.
    """

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _InPlaceTracer(fx.Tracer):
    """Tracer of fx that also records in-place operators."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Tracer(_InPlaceTracer):
    """Traces through each module whose code a graph can represent.

    Attributes:
        kept: reasons of the modules kept whole, by name. A trace that adds one is not usable and
            must be repeated.
        calls: the recorded steps: kind and target of an operation, or the name of a module that was
            traced through and its own list.
    """

    def __init__(self, kept: dict[str, str]) -> None:
        layers = sys.modules.get("timm.layers._fx")  # timm lists what fx cannot trace
        functions = layers.get_notrace_functions() if layers else ()
        super().__init__(autowrap_functions=tuple(filter(callable, functions)))
        self._untraceable = tuple(layers.get_notrace_modules()) if layers else ()
        self._ambient = torch.is_grad_enabled()
        self.kept = kept
        self.calls: list[Any] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, (EpsilonGate, Tap, ByMode, *self._untraceable))
            or super().is_leaf_module(m, module_qualified_name)
            or _is_layer(m)
            or module_qualified_name in self.kept
        )

    def create_node(self, kind: str, target: Any, *rest: Any, **named: Any) -> fx.Node:
        if torch.is_grad_enabled() != self._ambient:
            raise _Unfaithful("switches gradients off or on (torch.no_grad)")
        self.calls.append((kind, target))
        return super().create_node(kind, target, *rest, **named)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        stack, outer = self.module_stack.copy(), self.calls
        self.calls = []
        outer.append((path, self.calls))
        before = _state(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
            self._refuse_change(m, before)
            return result
        except Exception as error:  # the user's forward() may raise anything on a proxy
            self.kept[path] = _reason(error)
            self.module_stack = stack
            return self.create_proxy("call_module", path, args, kwargs)
        finally:
            self.calls = outer

    def trace_model(self, model: nn.Module) -> fx.Graph:
        """Return the graph of `model`, whose state the trace may change."""
        fixed = {
            name: parameter.default
            for name, parameter in inspect.signature(model.forward).parameters.items()
            if parameter.default is None or isinstance(parameter.default, (bool, int, float, str))
        }
        self._random = _random_states()
        before = _state(model)
        with _refusing_contexts():
            graph = self.trace(model, concrete_args=fixed or None)
        self._refuse_change(model, before)
        # Erase the inputs that fx keeps for the fixed arguments, and the checks of their values.
        for node in [n for n in graph.nodes if n.op == "placeholder" and n.args]:
            if str(node.target).rpartition("_")[0] in fixed:
                for member in reversed(_closure(node, lambda n: n.users)):
                    graph.erase_node(member)
        return graph

    def _refuse_change(self, module: nn.Module, before: list[Any]) -> None:
        """Raise _Unfaithful if a module drew random numbers or changed its own state."""
        drawn, self._random = self._random, _random_states()
        if drawn != self._random:
            raise _Unfaithful(DRAWS)
        for (name, *old), (_, *new) in zip(before, _state(module), strict=False):
            if old != new:
                raise _Unfaithful(f"changes its own {name} in forward()")


def trace(model: nn.Module, *, one_mode: bool = False, copied: bool = True) -> fx.GraphModule:
    """Return `model` as a graph over the same modules and tensors; a graph is returned unchanged.

    A copy is traced: `model` and its state do not change. Optional arguments of `forward()` are
    fixed at their defaults.

    Args:
        one_mode: trace only the mode that `model` is in; the graph is not valid in the other.
        copied: False, with `one_mode`, traces `model` itself, whose `forward()` changes nothing.

    Raises:
        GraphError: the forward pass of the network itself cannot be traced, or depends on the mode
            in a way that a graph cannot represent.
    """
    if isinstance(model, fx.GraphModule):
        return model
    name = type(model).__name__
    kept: dict[str, str] = {}
    try:
        known = -1
        while len(kept) != known:
            known = len(kept)
            with unmoved_random():
                mode = model.training if one_mode else True
                first = _trace_once(model, kept, mode, copied=copied)
                switched = {}
                if not one_mode and len(kept) == known:
                    switched = _differences(first, _trace_once(model, kept, False), kept)
    except ModesDiffer:
        raise GraphError(
            f"{name}: its forward() takes other paths in training than in evaluation;"
            " move what differs into a module of its own"
        ) from None
    except _Unfaithful as error:
        raise GraphError(
            f"{name}: its forward() {error}, which torch.fx cannot follow; move that into a module"
            " of its own"
        ) from None
    except Exception as error:  # the user's forward() may raise anything on a proxy
        raise GraphError(
            f"{name}: torch.fx cannot trace it ({_reason(error)}); remove control"
            " flow that depends on tensor values from its forward()"
        ) from error
    traced = fx.GraphModule(_Origins(model, first.constants), first.graph, name)
    traced.meta |= {KEPT: kept, OWN: frozenset(model.state_dict())}
    for node, counterpart in switched.items():
        _insert_by_mode(traced, node, counterpart)
    if switched:
        traced.recompile()
    return traced


class _Origins(nn.Module):
    """Root of a graph: the modules and tensors of a network, and the constants of its trace."""

    def __init__(self, model: nn.Module, constants: dict[str, Any]) -> None:
        super().__init__()
        self.__dict__ |= {"training": model.training, "_model": model, **constants}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)


class _Trace(NamedTuple):
    graph: fx.Graph
    calls: list[Any]  # see _Tracer
    constants: dict[str, Any]  # tensors that are no attributes of the network, by their names in fx


def _trace_once(
    model: nn.Module, kept: dict[str, str], training: bool, *, copied: bool = True
) -> _Trace:
    traced = _copy(model) if copied else model
    for module in traced.modules():
        module.training = training
    tracer = _Tracer(kept)
    graph = tracer.trace_model(traced)
    targets = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    constants = {n: getattr(traced, n) for n in targets if "." not in n and not hasattr(model, n)}
    return _Trace(graph, tracer.calls, constants)


def _copy(model: nn.Module) -> nn.Module:
    """Return a deep copy, including the closures of functions among the modules' attributes."""
    memo: dict[int, Any] = {}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for name, value in vars(module).items():
            if isinstance(value, FunctionType) and value.__closure__:
                cells = tuple(
                    CellType(copy.deepcopy(c.cell_contents, memo)) for c in value.__closure__
                )
                vars(module)[name] = FunctionType(
                    value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
                )
    return copied


def _differences(
    training: _Trace, evaluating: _Trace, kept: dict[str, str]
) -> dict[fx.Node, fx.Node]:
    """Return the calls whose constants differ; add modules that take other steps to `kept`."""
    others = list(_other_calls("", training.calls, evaluating.calls))
    if not others:
        try:
            return _differing_calls(training.graph, evaluating.graph)
        except ModesDiffer as error:
            others = [owner(error.args[0])]
    if "" in others:
        raise ModesDiffer
    kept |= dict.fromkeys(others, OTHER_STEPS)
    return {}


def _other_calls(path: str, one: list[Any], other: list[Any]) -> Iterator[str]:
    """Yield the names of the innermost modules whose recorded steps differ between two traces."""
    steps, others = (
        [call[0] if isinstance(call[1], list) else call for call in calls] for calls in (one, other)
    )
    if steps != others:
        yield path
        return
    for (name, inner), (_, counterpart) in zip(one, other, strict=True):
        if isinstance(inner, list):
            yield from _other_calls(name, inner, counterpart)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is or derives from a layer of torch (BatchNorm with an activation)."""
    bases = (base for base in type(module).__mro__ if base not in _CONTAINERS)
    return any(base.__module__.startswith("torch.nn.modules") for base in bases)


def _state(module: nn.Module) -> list[Any]:
    """State of a module that its code may change without a step in the graph."""
    tensors = [(n, id(t), t._version) for n, t in module.named_buffers(recurse=False)]
    tensors += [(n, id(p), p._version) for n, p in module.named_parameters(recurse=False)]
    return tensors + [(n, v) for n, v in vars(module).items() if type(v) in (bool, int, float)]


def _random_states() -> list[Any]:
    numpy = sys.modules.get("numpy.random")
    legacy = [(s := numpy.get_state())[1].tobytes(), s[2:]] if numpy else []
    return [torch.get_rng_state().numpy().tobytes(), random.getstate(), *legacy]


@contextmanager
def unmoved_random() -> Iterator[None]:
    """Restore the random states of torch (CPU), Python and NumPy on exit."""
    numpy = sys.modules.get("numpy.random")
    python, legacy = random.getstate(), numpy.get_state() if numpy else None
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.set_state(legacy)


@contextmanager
def _refusing_contexts() -> Iterator[None]:
    """Make `autograd.Function` and autocast raise, which a trace would not record."""

    def refused(owner: type, name: str, reason: str) -> Any:
        return mock.patch.object(owner, name, side_effect=_Unfaithful(reason))

    with (
        refused(torch.autograd.Function, "apply", "calls an autograd.Function"),
        refused(torch.autocast, "__enter__", "runs under torch.autocast"),
    ):
        yield


def _reason(error: Exception) -> str:
    line = one_line(error)
    return line if len(line) <= _REASON else line[: _REASON - 3] + "..."


def _insert_by_mode(traced: fx.GraphModule, node: fx.Node, counterpart: fx.Node) -> None:
    """Replace a call of the training graph by a `ByMode` of it and its call in evaluation."""
    module = ByMode(node.target, _call(node), _call(counterpart))
    path = free_name(traced, owner(node), "by_mode")
    module.training = traced.training
    traced.add_submodule(path, module)
    with traced.graph.inserting_before(node):
        replacement = traced.graph.call_module(path, tuple(node.all_input_nodes))
    replacement.meta = node.meta
    node.replace_all_uses_with(replacement)
    traced.graph.erase_node(node)


def owner(node: fx.Node) -> str:
    """Qualified name of the module whose `forward()` recorded `node`; "" for the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def free_name(model: nn.Module, place: str, name: str) -> str:
    """Return the first of `place.name`, `place.name2`, ... that is no attribute of `model`."""
    try:
        inner = model.get_submodule(place)
    except AttributeError:
        inner = nn.Module()
    count, candidate = 1, name
    while hasattr(inner, candidate):
        count += 1
        candidate = f"{name}{count}"
    return f"{place}.{candidate}" if place else candidate


# -- In-place operations and aliases

# Operations whose result may be their operand or a view of it.
_PASSING_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd, ByMode)
_PASSING_NAMES = (
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "expand"),
    *("squeeze", "unsqueeze", "contiguous", "to", "type", "float", "chunk", "split", "unbind"),
    *("narrow", "select", "getitem", "__getitem__", "dropout"),
)
_WRITING_OPERATORS = frozenset(
    {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}
)


def written_into(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a later operation may overwrite the value of `node`: `ReLU(inplace=True)`, say."""
    same = _closure(node, lambda n: [user for user in n.users if _passes(user, modules)])
    return any(writes(user, n, modules) for n in same for user in n.users)


def acts_on_others(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether `node` writes into a tensor that other nodes read, so that it is needed if unused.

    Examples are the statement `x.add_(1)`, and a `ReLU(inplace=True)` at the start of a branch,
    which also rectifies the shortcut.
    """
    source = _first(node)
    if source is None or not writes(node, source, modules):
        return False
    while source is not None:
        if len(source.users) > 1 or source.op == "placeholder":
            return True
        operand = _first(source)
        source = operand if _passes(source, modules) or writes(source, operand, modules) else None
    return False


def one_tensor(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """Return the nodes whose value is the same tensor as that of `node`: it, and its identities."""

    def is_identity(step: fx.Node) -> bool:
        return step.op == "call_module" and isinstance(modules[str(step.target)], nn.Identity)

    while is_identity(node) and (source := _first(node)) is not None:
        node = source
    return _closure(node, lambda n: filter(is_identity, n.users))


def aliases(node: fx.Node, modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """Return the nodes whose value may share memory with that of `node`."""

    def shares(user: fx.Node, operand: fx.Node) -> bool:
        return _passes(user, modules) or writes(user, operand, modules)

    def near(here: fx.Node) -> Iterator[fx.Node]:
        yield from (user for user in here.users if shares(user, here))
        if (operand := _first(here)) is not None and shares(here, operand):
            yield operand

    return set(_closure(node, near))


def _closure(node: fx.Node, near: Callable[[fx.Node], Iterable[fx.Node]]) -> list[fx.Node]:
    """Return `node` and all nodes that `near` leads to from it."""
    found = {node: None}
    queue = [node]
    for here in queue:
        fresh = [other for other in near(here) if other not in found]
        found |= dict.fromkeys(fresh)
        queue += fresh
    return list(found)


def _first(node: fx.Node) -> fx.Node | None:
    """The first argument of a step, if it is the result of another."""
    operand = node.args[0] if node.args else None
    return operand if isinstance(operand, fx.Node) else None


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def writes(user: fx.Node, operand: object, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a step overwrites its first argument, `operand`."""
    if user.op == "call_module":
        return _module_writes(modules[str(user.target)])
    if user.op == "output" or not user.args or user.args[0] is not operand:
        return False
    if user.target in _WRITING_OPERATORS or user.kwargs.get("inplace"):
        return True
    name = _name(user)
    if name.startswith("__"):
        return name.startswith("__i")
    # `F.relu(x, True)`: the only positional flag of relu-like functions is `inplace`.
    positional = user.op == "call_function" and True in user.args[1:] and "relu" in name
    return name.endswith("_") or positional


def _module_writes(module: nn.Module) -> bool:
    if isinstance(module, (EpsilonGate, Tap)):
        return False
    if isinstance(module, ByMode):
        return any(kwargs.get("inplace") for _, kwargs in module.calls.values())
    own = not type(module).__module__.startswith("torch.")
    flag = getattr(module, "inplace", None)
    return _code_writes(module) if own and flag is None else bool(flag)


def _code_writes(module: nn.Module) -> bool:
    """Whether the code of a user's layer overwrites its input, in either mode."""
    for training in (True, False):
        copied = copy.deepcopy(module)  # tracing runs its code, which may change its state
        try:
            with in_mode(copied, training), unmoved_random():
                steps = _InPlaceTracer().trace(copied)
        except Exception:  # fx cannot trace it; its code may raise anything on a proxy
            continue
        inner = dict(copied.named_modules())
        if any(written_into(node, inner) for node in steps.nodes if node.op == "placeholder"):
            return True
    return False


def _passes(user: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if user.op == "call_module":
        module = modules[str(user.target)]
        if isinstance(module, EpsilonGate):
            return False  # its result is a new tensor
        own = not type(module).__module__.startswith("torch.")  # DropPath and the like
        plain = own and not any(True for _ in module.parameters())
        return isinstance(module, _PASSING_MODULES) or plain
    return user.op in ("call_function", "call_method") and _name(user) in _PASSING_NAMES
