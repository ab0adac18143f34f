"""A traced network as plain data, for files that are read without the code of its author.

:func:`store` turns a graph over layers of `torch.nn` into dicts, lists, strings and numbers, and
:func:`rebuild` makes it again; tensors are stored apart, in the state dict. No code is stored:
steps are functions and methods of torch by name, layers are classes of `torch.nn` with their
arguments. `torch.export` files are no substitute, because reading them evaluates pickles and
expressions of the file.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, EllipsisType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import get_overridable_functions

from eps_core.errors import ConfigError, one_line
from eps_train.gating.gate import EpsilonGate
from eps_train.gating.rewriting import UNGATED, Ungated
from eps_train.gating.tracing import OWN, ByMode, Slot
from eps_train.models.resnets import Tap

FAMILY = "graph"  # `NetworkSpec.family` of a network that is stored so

_OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "abs", "getitem"),
    *("iadd", "isub", "imul", "itruediv"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
)
_CREATORS = (  # not overridable, for they take no tensor
    *("_assert", "zeros", "ones", "full", "empty", "arange", "linspace", "eye", "tensor", "rand"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn", "randn_like"),
)
_METHODS = ("new_zeros", "new_ones", "new_full", "new_empty")
_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "T", "mT", "H", "mH", "real", "imag", "is_cuda")
_EFFECTS = {  # methods that do more than compute with tensors
    *("apply_", "map_", "map2_", "backward", "register_hook", "share_memory_", "set_", "numpy"),
    *("register_post_accumulate_grad_hook", "storage", "untyped_storage", "data_ptr", "tolist"),
    *("module_load", "retain_grad", "pin_memory", "record_stream"),
}
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_SINGLE = (type(None), bool, int, float, str)
_TORCH = (torch.dtype, torch.device, torch.memory_format, torch.layout)


class NotStorable(ConfigError):
    """A network that plain data cannot hold; the message names the part."""


# -- Writing


def store(model: fx.GraphModule) -> dict[str, Any]:
    """Describe a network without its tensors.

    Raises:
        NotStorable: a layer that is not of `torch.nn`, or is changed beyond its arguments; a
            function that is not of torch; an argument that is not plain.
    """
    nodes = []
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    first: dict[int, str] = {}  # paths of layers and parameters, of which later ones are the same
    for node in model.graph.nodes:
        nodes.append(
            {
                "name": node.name,
                "op": node.op,
                "target": _function_name(node) if node.op == "call_function" else str(node.target),
                "args": _plain(node.args, node.name),
                "kwargs": _plain(dict(node.kwargs), node.name),
            }
        )
        path = str(node.target)
        if node.op == "call_method" and path not in _methods():
            raise NotStorable(f"{node.name}: calls {path}(), which is no computation on a tensor")
        if node.op == "call_module" and path not in layers:
            layers[path] = _layer(path, modules[path], first)
        if node.op == "get_attr" and path not in tensors:
            tensors[path] = _tensor(path, model, first)
    return {
        "name": model._get_name(),
        "nodes": nodes,
        "layers": layers,
        "tensors": tensors,
        "frozen": sorted(name for name, p in model.named_parameters() if not p.requires_grad),
        "own": sorted(model.meta.get(OWN, ())),
        "ungated": [[each.place, each.reason] for each in model.meta.get(UNGATED, ())],
    }


def _layer(path: str, module: nn.Module, first: dict[int, str]) -> dict[str, Any]:
    if (same := first.setdefault(id(module), path)) != path:
        return {"same": same}
    if isinstance(module, ByMode):
        function = module.function
        name = function if isinstance(function, str) else _names().get(function)
        if name is None or (isinstance(function, str) and name not in _methods()):
            named = getattr(function, "__qualname__", function)
            raise NotStorable(f"{path}: calls {named}, which is no computation of torch")
        calls = [_plain(list(module.calls[mode]), path) for mode in (True, False)]
        return {"type": "ByMode", "method": isinstance(function, str), "name": name, "calls": calls}
    kind = type(module)
    if kind is EpsilonGate:  # its threshold and record are tensors
        return {"type": kind.__name__, "arguments": _plain({}, path), "same": {}}
    if kind is not Tap and getattr(nn, kind.__name__, None) is not kind:
        raise NotStorable(
            f"{path}: {kind.__module__}.{kind.__qualname__} is no layer of torch.nn, and its code"
            " would be needed"
        )
    described: dict[str, Any] = {
        "type": kind.__name__,
        "arguments": _plain(_arguments(module), path),
        "same": {
            name: same
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if (same := first.setdefault(id(parameter), f"{path}.{name}")) != f"{path}.{name}"
        },
    }
    with torch.device("meta"):
        again = _make_layer(path, described)
    if _traits(again) != _traits(module):
        raise NotStorable(
            f"{path}: {kind.__name__} was changed after it was made, or holds other modules; write"
            " what it does as a module of its own"
        )
    return described


def _arguments(module: nn.Module) -> dict[str, Any]:
    """Arguments of a layer's constructor, read from its attributes of the same names."""
    found = {}
    for name in inspect.signature(type(module)).parameters:
        if name in ("device", "dtype") or not hasattr(module, name):
            continue  # an argument without an attribute shows in the layer's traits
        value = getattr(module, name)
        if name == "bias":
            value = value is not None if not isinstance(value, bool) else value
        found[name] = value
    return found


def _traits(module: nn.Module) -> list[Any]:
    """All of a module but the values of its tensors, and its mode."""
    return [
        (
            name,
            type(part),
            {k: v for k, v in vars(part).items() if not (k.startswith("_") or k == "training")},
            part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or None,
            [(k, v if v is None else v.shape) for k, v in part._parameters.items()],
            [(k, v if v is None else v.shape) for k, v in part._buffers.items()],
            sorted(part._non_persistent_buffers_set),
        )
        for name, part in module.named_modules()
    ]


def _tensor(path: str, model: fx.GraphModule, first: dict[int, str]) -> dict[str, Any]:
    place, _, name = path.rpartition(".")
    value = getattr(model.get_submodule(place), name)
    if not isinstance(value, Tensor):
        raise NotStorable(f"{path}: is a {type(value).__name__}, not a tensor")
    if path not in model.state_dict():
        raise NotStorable(f"{path}: is not in the state dict; make it a parameter or a buffer")
    if (same := first.setdefault(id(value), path)) != path:
        return {"same": same}
    return {
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "parameter": isinstance(value, nn.Parameter),
    }


def _function_name(node: fx.Node) -> str:
    if node.target is getattr:
        if node.args[1] not in _ATTRIBUTES:
            raise NotStorable(f"{node.name}: reads .{node.args[1]} of a tensor")
        return "getattr"
    assert callable(node.target)
    try:
        return _names()[node.target]
    except (KeyError, TypeError):
        raise NotStorable(
            f"{node.name}: calls {node._pretty_print_target(node.target)}, which is no function of"
            " torch, and its code would be needed"
        ) from None


def _plain(value: Any, place: str) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, Slot):
        return {"slot": value.index}
    if type(value) in _SINGLE:
        return value
    if isinstance(value, slice):
        return {"slice": [_plain(part, place) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, EllipsisType):
        return {"ellipsis": True}
    if isinstance(value, tuple):
        return {"tuple": [_plain(part, place) for part in value]}
    if isinstance(value, list):
        return [_plain(part, place) for part in value]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {"dict": {key: _plain(part, place) for key, part in value.items()}}
    if isinstance(value, _TORCH):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    raise NotStorable(f"{place}: {type(value).__name__} as an argument is no plain data")


# -- Reading


def rebuild(stored: Mapping[str, Any]) -> fx.GraphModule:
    """Build the network of :func:`store`, in training mode, on the device of the context.

    Its tensors have no values: load a state dict. Raises ConfigError for anything that
    :func:`store` does not write.
    """
    try:
        return _rebuild(stored)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise ConfigError(
            f"not a stored graph ({type(error).__name__}: {one_line(error)})"
        ) from error


def _rebuild(stored: Mapping[str, Any]) -> fx.GraphModule:
    root = nn.Module()
    for path, described in stored["layers"].items():
        same = described.get("same")
        layer = root.get_submodule(same) if isinstance(same, str) else _make_layer(path, described)
        place, name = _place(root, path)
        place.add_module(name, layer)
    for path, described in stored["tensors"].items():
        place, name = _place(root, path)
        if "same" in described:
            owner, _, other = described["same"].rpartition(".")
            value = getattr(root.get_submodule(owner), other)
        else:
            dtype = _torch_value("dtype", described["dtype"])
            value = torch.empty(described["shape"], dtype=dtype)
            if described["parameter"]:
                value = nn.Parameter(value, requires_grad=dtype.is_floating_point)
        if isinstance(value, nn.Parameter):
            place.register_parameter(name, value)
        else:
            place.register_buffer(name, value)
    for path, described in stored["layers"].items():
        if isinstance(described.get("same"), dict):
            for name, same in described["same"].items():
                owner, _, last = f"{path}.{name}".rpartition(".")
                root.get_submodule(owner).register_parameter(last, root.get_parameter(same))
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for node in stored["nodes"]:
        made[node["name"]] = _add_node(graph, node, made)
    if [node.op for node in graph.nodes].count("output") != 1 or not graph.find_nodes(
        op="placeholder"
    ):
        raise ValueError("no input or output")
    model = fx.GraphModule(root, graph, _identifier(stored["name"]))
    for name in stored["frozen"]:
        model.get_parameter(name).requires_grad_(False)
    model.meta |= {
        OWN: frozenset(stored["own"]),
        UNGATED: [Ungated(place, reason) for place, reason in stored["ungated"]],
    }
    return model


def _add_node(graph: fx.Graph, node: Mapping[str, Any], made: Mapping[str, fx.Node]) -> fx.Node:
    op, target = node["op"], node["target"]
    args, kwargs = _value(node["args"], made), _value(node["kwargs"], made)
    if op == "call_function" and target == "getattr":
        if args[1] not in _ATTRIBUTES:
            raise ValueError(f"getattr of {args[1]}")
        target = getattr
    elif op == "call_function":
        target = _functions()[target]
    elif op == "call_method":
        if target not in _methods():
            raise ValueError(f"method {target}")
    elif op in ("call_module", "get_attr"):
        _atoms(target)
    elif op == "placeholder":
        _identifier(target)
    elif op != "output":
        raise ValueError(f"step {op}")
    return graph.create_node(op, target, args, kwargs, node["name"])


def _make_layer(path: str, described: Mapping[str, Any]) -> nn.Module:
    kind = described["type"]
    if kind == "ByMode":
        name = described["name"]
        if described["method"] and name not in _methods():
            raise ValueError(f"method {name}")
        training, evaluating = (_value(call, {}) for call in described["calls"])
        return ByMode(name if described["method"] else _functions()[name], training, evaluating)
    ours: dict[str, type[nn.Module]] = {"Tap": Tap, "EpsilonGate": EpsilonGate}
    layer = ours.get(kind) or getattr(nn, _identifier(kind))
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise ValueError(f"layer {kind}")
    arguments = _value(described["arguments"], {})
    try:
        made: nn.Module = layer(**arguments)
    except Exception as error:  # a layer that wants what it does not store
        raise NotStorable(f"{path}: {kind} cannot be made of its attributes ({error})") from error
    return made


def _place(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds `path`, made of empty ones, and the last part of the name."""
    *outer, name = _atoms(path)
    for part in outer:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root, name


def _value(stored: Any, made: Mapping[str, fx.Node]) -> Any:
    if isinstance(stored, list):
        return [_value(part, made) for part in stored]
    if not isinstance(stored, dict):
        if type(stored) not in _SINGLE:
            raise TypeError(f"{type(stored).__name__} as an argument")
        return stored
    ((kind, content),) = stored.items()
    if kind == "node":
        return made[content]
    if kind == "slot":
        return Slot(int(content))
    if kind == "tuple":
        return tuple(_value(part, made) for part in content)
    if kind == "slice":
        return slice(*(_value(part, made) for part in content))
    if kind == "dict":
        return {str(key): _value(part, made) for key, part in content.items()}
    if kind == "ellipsis":
        return ...
    return _torch_value(kind, content)


def _torch_value(kind: str, name: str) -> Any:
    if kind == "device":
        return torch.device(name)
    value = getattr(torch, _identifier(name))
    if type(value).__name__ != kind or not isinstance(value, _TORCH):
        raise ValueError(f"{name} as {kind}")
    return value


def _identifier(name: str) -> str:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{name!r} as a name")
    return name


def _atoms(path: str) -> list[str]:
    """Parts of a path, which fx writes into the code of the graph, in quotes if need be."""
    parts = path.split(".")
    for part in parts:
        if not re.fullmatch(r"[\w -]+", part):
            raise ValueError(f"{part!r} as a name")
    return parts


# -- What a graph may call


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Functions that a stored graph may call, by name."""
    overridable = {
        function
        for members in get_overridable_functions().values()
        for function in members
        if isinstance(function, _FUNCTIONS)
    }
    found: dict[str, Callable[..., Any]] = {}
    for space in (torch, nn.functional, torch.linalg, torch.fft, torch.special):
        for name in dir(space):
            value = getattr(space, name)
            if name.startswith("_") or not isinstance(value, _FUNCTIONS):
                continue
            if value in overridable or value.__module__ == "torch.nn.functional":
                found[f"{space.__name__}.{name}"] = value
    found |= {f"torch.{name}": getattr(torch, name) for name in _CREATORS}
    found |= {f"operator.{name}": getattr(operator, name) for name in _OPERATORS}
    found |= {f"math.{name}": getattr(math, name) for name in ("sqrt", "floor", "ceil", "prod")}
    return found


@functools.cache
def _names() -> dict[Callable[..., Any], str]:
    return {function: name for name, function in reversed(_functions().items())}


@functools.cache
def _methods() -> frozenset[str]:
    """Methods of tensors that a stored graph may call."""
    members = get_overridable_functions()[torch.Tensor]
    names = {getattr(member, "__name__", "_") for member in members}
    named = {name for name in names if not name.startswith("_") and hasattr(Tensor, name)}
    return frozenset(named - _EFFECTS | {*_METHODS})
