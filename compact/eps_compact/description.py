"""A network as plain data: every step in order, by the name of its ATen operator.

The operators' meaning is PyTorch's (`aten.conv2d` is `torch.nn.functional.conv2d`, and so on);
their arguments are named as in its schemas. No step overwrites an operand, so that a reader in
any language can go through the list with a dictionary of results.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from eps_train.errors import GraphError

Step = dict[str, Any]
"""`name` of the result; `op`; `inputs`: arguments by name; `dtype` and `shape` of the result.

An argument is a number, a text, a list, null, or an object of one key: `step` (the result of that
name, or the network's input), `tensor` (a stored one), `dtype`, or `float` (`inf`, `-inf`, `nan`).
Arguments at their defaults are given too; those that say where and how to store are left out. In
shapes `N` is the batch. `getitem` takes one of an operator's several results; its `dtype` and
`shape` are those of that result, and such an operator's own are null.
"""

_STORAGE = ("device", "layout", "pin_memory", "memory_format", "requires_grad", "non_blocking")


def steps(program: ExportedProgram) -> tuple[list[Step], dict[str, str]]:
    """The steps of a functional program (`run_decompositions({})`), and its result as an argument.

    Raises GraphError for a step that is no ATen operator.
    """
    names = _stored(program)
    images = next(node for node in program.graph.nodes if _is_input(node, names))
    writer = _Writer(names, batch=str(images.meta["val"].shape[0]))
    found = []
    for node in program.graph.nodes:
        # Without in-place steps, what nothing reads is a check of torch's own.
        if node.op == "call_function" and node.users:
            found.append(writer.step(node))
    (output,) = next(node for node in program.graph.nodes if node.op == "output").args[0]
    return found, writer.argument(output)


def tensors(program: ExportedProgram, used_by: list[Step]) -> dict[str, Tensor]:
    """The stored tensors that the steps use, contiguous and each with memory of its own."""
    known = {**program.state_dict, **program.constants}
    wanted = {name for step in used_by for name in _mentioned(step["inputs"])}
    return {name: known[name].detach().cpu().contiguous().clone() for name in sorted(wanted)}


def _mentioned(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in _mentioned(item)]
    if isinstance(value, dict):
        if isinstance(name := value.get("tensor"), str):
            return [name]
        return [name for item in value.values() for name in _mentioned(item)]
    return []


def _stored(program: ExportedProgram) -> dict[str, str]:
    """Names of the stored tensors by the graph's names for them."""
    return {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT and spec.target is not None
    }


def _is_input(node: fx.Node, stored: dict[str, str]) -> bool:
    return node.op == "placeholder" and node.name not in stored


class _Writer:
    """Turns the nodes of a graph into plain data."""

    def __init__(self, stored: dict[str, str], *, batch: str) -> None:
        self._stored = stored
        self._batch = batch

    def step(self, node: fx.Node) -> Step:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            name = str(target).removesuffix(".default")
            declared = target._schema.arguments
            given = dict(zip((a.name for a in declared), node.args, strict=False)) | node.kwargs
            # All of them: a reader of another language cannot look the defaults up.
            values = {
                a.name: given.get(a.name, a.default_value if a.has_default_value() else None)
                for a in declared
                if a.name not in _STORAGE
            }
        elif target is operator.getitem:
            name, values = "getitem", {"input": node.args[0], "index": node.args[1]}
        elif getattr(target, "__module__", "") == "_operator":  # on sizes
            name = f"operator.{getattr(target, '__name__', target)}"
            values = {f"arg{index}": value for index, value in enumerate(node.args)}
        else:
            raise GraphError(
                f"--export safetensors: step {node.name} ({target}) is no plain operator; use"
                " --export pt2"
            )
        inputs = {key: self.argument(value) for key, value in values.items()}
        return {"name": node.name, "op": name, "inputs": inputs, **self._result(node)}

    def argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            stored = self._stored.get(value.name)
            return {"tensor": stored} if stored is not None else {"step": value.name}
        if isinstance(value, (list, tuple)):
            return [self.argument(item) for item in value]
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        return str(value)

    def _result(self, node: fx.Node) -> dict[str, Any]:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return {"dtype": None, "shape": None}
        shape = [
            size if type(size) is int else str(size).replace(self._batch, "N")
            for size in value.shape
        ]
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
