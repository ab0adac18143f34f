"""Which steps of a network write into their operand, and would spoil it for its other readers."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import TypeGuard

from torch import fx, nn

from eps_train.gate import EpsilonGate
from eps_train.modes import ByMode, in_mode
from eps_train.networks import Tap
from eps_train.tracing import InPlaceTracer, unmoved_random

# Steps whose result may be their operand itself, or a view of it.
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
    """Whether some later step may overwrite what `node` holds: `ReLU(inplace=True)`, say."""
    queue, seen = [node], {node}
    while queue:
        here = queue.pop()
        for user in here.users:
            if _writes(user, here, modules):
                return True
            if user not in seen and _passes(user, modules):
                seen.add(user)
                queue.append(user)
    return False


def acts_on_others(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether `node` writes into a tensor that other steps read: it counts even if unused itself.

    `x.add_(1)` as a statement is of that kind, or a `ReLU(inplace=True)` that a branch begins with,
    which rectifies the shortcut as well.
    """
    path = node
    if not (path.args and isinstance(path.args[0], fx.Node)):
        return False
    if not _writes(path, path.args[0], modules):
        return False
    while isinstance(source := path.args[0] if path.args else None, fx.Node):
        if any(user is not path for user in source.users) or source.op == "placeholder":
            return True
        path = source
        operand = path.args[0] if path.args else None
        if not (_passes(path, modules) or _writes(path, operand, modules)):
            return False
    return False


def one_tensor(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """The nodes that hold the very tensor that `node` holds: it, and what identities hand on."""

    def hands_on(step: object) -> TypeGuard[fx.Node]:
        if not isinstance(step, fx.Node) or step.op != "call_module":
            return False
        return isinstance(modules[str(step.target)], nn.Identity)

    while hands_on(node) and isinstance(source := node.args[0], fx.Node):
        node = source
    found = [node]
    for member in found:
        found += [user for user in member.users if hands_on(user)]
    return found


def aliases(node: fx.Node, modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """The nodes that may hold the memory that `node` holds, or a part of it."""
    found, queue = {node}, [node]
    while queue:
        here = queue.pop()
        near = [u for u in here.users if _passes(u, modules) or _writes(u, here, modules)]
        operand = here.args[0] if here.args else None
        if isinstance(operand, fx.Node) and (
            _passes(here, modules) or _writes(here, operand, modules)
        ):
            near.append(operand)
        queue += [other for other in near if other not in found]
        found.update(near)
    return found


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _writes(user: fx.Node, operand: object, modules: Mapping[str, nn.Module]) -> bool:
    if user.op == "call_module":
        return _module_writes(modules[str(user.target)])
    if user.op == "output" or not user.args or user.args[0] is not operand:
        return False
    if user.target in _WRITING_OPERATORS or user.kwargs.get("inplace"):
        return True
    name = _name(user)
    if name.startswith("__"):
        return name.startswith("__i")
    # `F.relu(x, True)`: no function of this kind has another flag in that place.
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
    """Whether the code of somebody's own layer overwrites what it is given, in either mode."""
    for training in (True, False):
        copied = copy.deepcopy(module)  # its code runs, and may change its state
        try:
            with in_mode(copied, training), unmoved_random():
                steps = InPlaceTracer().trace(copied)
        except Exception:  # fx cannot follow it; whatever its code raises on a proxy
            continue
        inner = dict(copied.named_modules())
        if any(written_into(node, inner) for node in steps.nodes if node.op == "placeholder"):
            return True
    return False


def _passes(user: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if user.op == "call_module":
        module = modules[str(user.target)]
        if isinstance(module, EpsilonGate):
            return False  # its result is a tensor of its own
        own = not type(module).__module__.startswith("torch.")  # DropPath and the like
        plain = own and not any(True for _ in module.parameters())
        return isinstance(module, _PASSING_MODULES) or plain
    return user.op in ("call_function", "call_method") and _name(user) in _PASSING_NAMES
