"""Finding the residual additions in a traced network, and which operand is the branch."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_", "__add__", "__iadd__")
_IN_PLACE = (operator.iadd, "add_", "__iadd__")
_SIZES = ("shape", "size", "dim", "ndim", "numel", "__len__")


@dataclass(frozen=True, slots=True)
class Residual:
    """One residual addition: its node, and which of its two operands is the branch."""

    node: fx.Node
    branch_index: int

    @property
    def operands(self) -> tuple[fx.Node, fx.Node]:
        """Shortcut and branch."""
        first, second = _values(self.node)
        assert isinstance(first, fx.Node)
        assert isinstance(second, fx.Node)
        return (first, second) if self.branch_index else (second, first)

    @property
    def overwritten(self) -> fx.Node | None:
        """The operand that the addition writes its result into; None when it is a new tensor."""
        return self.node.all_input_nodes[0] if self.node.target in _IN_PLACE else None


def residuals(model: fx.GraphModule) -> Iterator[Residual]:
    """The residual additions of a network, in the order of computation.

    An addition is residual when both operands are computed from one input of the network and one
    of them, the branch, has weighted layers outside the two operands' common ancestors. Which one
    is the branch is decided by the first of these that tells the operands apart:

    1. the other reaches a common ancestor past no weighted layer (an identity shortcut);
    2. it has more weighted layers outside the common ancestors;
    3. these layers have more parameters.

    Where nothing does, neither operand is a shortcut of the other, and the addition is left alone;
    so are additions of constants, of learned tensors and of sizes, and those with a factor.
    """
    weights = _Weights(model)
    ancestors = _ancestors(model.graph)
    for node in model.graph.nodes:
        pair = _operands(node)
        if pair and (found := _judge(node, pair, ancestors, weights)):
            yield found


class _Weights:
    """How many parameters each node of a network brings in."""

    def __init__(self, model: fx.GraphModule) -> None:
        self._modules = dict(model.named_modules())
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def __getitem__(self, node: fx.Node) -> int:
        if node.op == "call_module":
            return sum(p.numel() for p in self._modules[str(node.target)].parameters())
        if node.op == "get_attr" and str(node.target) in self._parameters:
            return self._parameters[str(node.target)].numel()
        return 0


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors of an addition; None for every other node."""
    known = _ADD_FUNCTIONS if node.op == "call_function" else _ADD_METHODS
    if node.op not in ("call_function", "call_method") or node.target not in known:
        return None
    values = _values(node)
    factor = node.kwargs.get("alpha", 1)
    if len(values) != 2 or factor != 1 or node.kwargs.get("out") is not None:
        return None
    first, second = values
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    return None if first is second or _is_size(first) or _is_size(second) else (first, second)


def _values(node: fx.Node) -> list[Any]:
    return [*node.args, *(node.kwargs[k] for k in ("input", "other") if k in node.kwargs)]


def _is_size(node: fx.Node) -> bool:
    """Whether a node holds a shape, or a number computed from one, and no tensor."""
    if node.target is getattr:
        return node.args[1] in _SIZES
    if node.op == "call_method":
        return node.target in _SIZES
    inputs = node.all_input_nodes
    plain = getattr(node.target, "__module__", "") in ("_operator", "operator", "math", "builtins")
    return node.op == "call_function" and plain and bool(inputs) and all(map(_is_size, inputs))


def _ancestors(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """For each node all that it is computed from, itself included."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        found[node] = {node}.union(*(found[source] for source in node.all_input_nodes))
    return found


def _judge(
    node: fx.Node,
    pair: tuple[fx.Node, fx.Node],
    ancestors: dict[fx.Node, set[fx.Node]],
    weights: _Weights,
) -> Residual | None:
    first, second = pair
    common = ancestors[first] & ancestors[second]
    if not any(ancestor.op == "placeholder" for ancestor in common):
        return None
    measures = []
    for operand in pair:
        own = [w for n in ancestors[operand] - common if (w := weights[n])]
        detour = not _reaches_unweighted(operand, common, weights)
        measures.append((detour, len(own), sum(own)))
    if measures[0] == measures[1] or not any(count for _, count, _ in measures):
        return None
    return Residual(node, branch_index=int(measures[1] > measures[0]))


def _reaches_unweighted(node: fx.Node, goal: set[fx.Node], weights: _Weights) -> bool:
    """Whether a path leads from `node` back to one of `goal` past no weighted layer."""
    queue, seen = [node], {node}
    while queue:
        here = queue.pop()
        if here in goal and here.op != "get_attr":
            return True
        sources = here.all_input_nodes
        if weights[here] or any(source.op == "get_attr" and weights[source] for source in sources):
            continue
        queue += [source for source in sources if source not in seen]
        seen.update(sources)
    return False
