"""What a network's code does, as a few numbers: two builds of one network have the same.

A compact network is kept as its name and its tensors; its steps come from code, which may be edited
or replaced by another version. So the certificate holds a digest of the steps, and a sketch of the
constants that no tensor of the file holds.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import math
import textwrap
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from eps_train.modes import ByMode

_ONE_BY_ONE = (bool, int, float, str, type(None), torch.dtype)
_TOLERANCE = 1e-4  # of a sketch: other processors and versions round a table of sines otherwise


def fingerprint(model: fx.GraphModule) -> dict[str, Any]:
    """Plain data: `code`, a SHA-256 of the network's steps; `constants`, sketches by name.

    Steps are the operations with their constants, the layers with their settings, and of layers
    that are not torch's the source code (without comments).
    """
    return {"code": _digest(model), "constants": _sketches(model)}


def difference(model: fx.GraphModule, recorded: Mapping[str, Any]) -> str | None:
    """What is not as it was recorded, in words; None when all is."""
    found = fingerprint(model)
    if found["code"] != recorded["code"]:
        return "the code of its network is not the code that was compacted"
    constants = recorded["constants"]
    if found["constants"].keys() != constants.keys():
        return "the constants of its network are not those that were compacted"
    for name, sketch in found["constants"].items():
        size = max(map(abs, [*sketch, *constants[name]]))
        pairs = zip(sketch, constants[name], strict=True)
        if not all(math.isclose(a, b, abs_tol=_TOLERANCE * size) for a, b in pairs):
            return f"the constant {name} of its network is not the one that was compacted"
    return None


def _digest(model: fx.GraphModule) -> str:
    order = {node: f"%{index}" for index, node in enumerate(model.graph.nodes)}
    lines = []
    for node in model.graph.nodes:
        operands = fx.node.map_arg((node.args, node.kwargs), lambda n: _Word(order[n]))
        lines.append(f"{node.op} {_name(node.target)} {operands!r}")
        if node.op == "call_module":
            lines += _layer(model.get_submodule(str(node.target)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Word(str):
    """A text that stands for itself."""

    def __repr__(self) -> str:
        return str(self)


def _name(target: Any) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"


def _layer(module: nn.Module) -> list[str]:
    """A line for each module inside, itself included."""
    lines = []
    for path, inner in module.named_modules():
        kind = type(inner)
        lines.append(f"{path} {_name(kind)} {_settings(inner)}")
        if isinstance(inner, ByMode):
            lines.append(f"{_name(inner.function)} {inner.calls!r}")
        lines += [_source(base) for base in kind.__mro__ if not _is_known(base)]
        lines += [_source(v) for v in vars(inner).values() if isinstance(v, FunctionType)]
    return lines


def _settings(module: nn.Module) -> dict[str, Any]:
    """The arguments that a layer was made with and keeps, where they are not the default.

    So an argument that a later version adds changes nothing.
    """
    parameters = inspect.signature(type(module).__init__).parameters.values()
    kept = {p.name: (vars(module)[p.name], p.default) for p in parameters if p.name in vars(module)}
    return {n: value for n, (value, usual) in kept.items() if _is_plain(value) and value != usual}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, _ONE_BY_ONE)


def _is_known(kind: type) -> bool:
    """Whether what the class does is told by its name."""
    return kind.__module__.partition(".")[0] in ("torch", "builtins", "eps_train")


def _source(code: Any) -> str:
    try:
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(code))))
    except (OSError, SyntaxError, TypeError):  # made by exec(), a lambda amid a call
        inner = getattr(code, "__code__", None)
        return f"{_name(code)} {inner and (inner.co_names, inner.co_consts[1:])}"


def _sketches(model: fx.GraphModule) -> dict[str, list[float]]:
    """Of each tensor beside the state dict three sums, which few others have in common."""
    held = model.state_dict().keys()
    found = {name: buffer for name, buffer in model.named_buffers() if name not in held}
    for path, module in model.named_modules():
        plain = {n: v for n, v in vars(module).items() if isinstance(v, Tensor)}
        found |= {f"{path}.{name}" if path else name: value for name, value in plain.items()}
    return {name: _sketch(value.detach()) for name, value in sorted(found.items())}


def _sketch(tensor: Tensor) -> list[float]:
    values = tensor.cpu().double().flatten().nan_to_num()
    places = torch.arange(len(values), dtype=torch.float64).mul(0.6180339887498949).frac()
    return [values.sum().item(), values.square().sum().item(), (values * places).sum().item()]
