"""Finding the residual additions in a traced network, and which operand is the branch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx

_ATEN = torch.ops.aten
_ADD = (
    *(operator.add, operator.iadd, torch.add, _ATEN.add, _ATEN.add.Tensor),
    *("add", "add_", "__add__", "__iadd__"),
)
_SUBTRACT = (
    *(operator.sub, operator.isub, torch.sub, torch.subtract, _ATEN.sub, _ATEN.sub.Tensor),
    *("sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"),
)
_ADD_PRODUCT = (torch.addcmul, "addcmul", "addcmul_")
_INTERPOLATE = (torch.lerp, "lerp", "lerp_")
_IN_PLACE = (operator.iadd, operator.isub, "__iadd__", "__isub__")
_SIZES = ("shape", "size", "dim", "ndim", "numel", "__len__")
_FILLS = (  # a new tensor of the size of another
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"),
)

Build = Callable[[fx.Graph], fx.Node]


@dataclass(frozen=True, slots=True)
class Residual:
    """One residual addition.

    Attributes:
        node: what adds; with `whole` a module that does so inside, to what it is given.
        swapped: whether the shortcut is the second operand.
    """

    node: fx.Node
    swapped: bool = False
    whole: bool = False

    def operands(self, graph: fx.Graph) -> tuple[fx.Node, fx.Node]:
        """Shortcut and branch; what has to be computed for that is added to the graph here."""
        if self.whole:
            (shortcut,) = self.node.all_input_nodes
            return shortcut, graph.call_function(operator.sub, (self.node, shortcut))
        found = _sum(self.node)
        assert found is not None
        if self.swapped:
            return found.other[0], found.first
        return found.first, found.branch(graph)

    @property
    def overwritten(self) -> fx.Node | None:
        """The operand that the result is written into; None when it is a new tensor."""
        return self.node.all_input_nodes[0] if _writes(self.node) else None


@dataclass(frozen=True, slots=True)
class Ungated:
    """A part of a network that gets no gate, and why.

    Attributes:
        place: qualified name of a module; "" for the network itself.
        reason: in words that follow the place.
    """

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Sum:
    """A node that adds to `first` a second term, which is computed from `other` by `branch`."""

    first: fx.Node
    other: tuple[fx.Node, ...]
    branch: Build
    commutes: bool = False  # the second term is a tensor as it stands: it may be the shortcut


def residuals(model: fx.GraphModule) -> Iterator[Residual | fx.Node]:
    """The residual additions of a network, in the order of computation.

    An addition (`+`, with or without a factor `alpha`, `-`, `addcmul`, `lerp`) is residual when
    both operands are computed from one input of the network and one of them, the branch, has
    weighted layers outside the two operands' common ancestors. Which one is the branch is decided
    by the first of these that tells the operands apart:

    1. the other reaches a common ancestor past no weighted layer (an identity shortcut);
    2. it has more weighted layers outside the common ancestors;
    3. these layers have more parameters.

    Where nothing does, neither operand is a shortcut of the other, and the node itself comes in
    the place of a `Residual`. Additions of constants, of learned tensors and of sizes are none, and
    what is computed from nothing of the input but its size is not computed from the input.
    """
    weights = _Weights(model)
    ancestors = _ancestors(model.graph)
    for node in model.graph.nodes:
        if (found := _sum(node)) is None:
            continue
        if not (measures := _measures(found, ancestors, weights)):
            continue
        one, other = measures
        if other > one or (one > other and found.commutes):
            yield Residual(node, swapped=one > other)
        else:
            yield node


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


def _sum(node: fx.Node) -> _Sum | None:
    """What a node adds; None when it does not add tensors."""
    if node.op not in ("call_function", "call_method") or node.kwargs.get("out") is not None:
        return None
    names = ("input", "other", "tensor1", "tensor2", "end", "weight")
    values: list[Any] = [*node.args, *(node.kwargs[name] for name in names if name in node.kwargs)]
    if not values or not _is_tensor(first := values[0]):
        return None
    target = node.target
    if target in _ADD_PRODUCT and len(values) == 3 and all(map(_is_tensor, values)):
        one, two = values[1:]
        value = node.kwargs.get("value", 1)
        return _Sum(first, (one, two), lambda g: _scaled(g, _scaled(g, one, two), value))
    if target in _INTERPOLATE and len(values) == 3 and _is_tensor(values[1]):
        end, weight = values[1:]
        others = (end, weight) if isinstance(weight, fx.Node) else (end,)
        return _Sum(
            first,
            others,
            lambda g: _scaled(g, g.call_function(operator.sub, (end, first)), weight),
        )
    if len(values) != 2 or not _is_tensor(second := values[1]) or first is second:
        return None
    factor = node.kwargs.get("alpha", 1)

    def scaled(graph: fx.Graph) -> fx.Node:
        return _scaled(graph, second, factor)

    if target in _ADD:
        plain = not isinstance(factor, fx.Node) and bool(factor == 1)
        return _Sum(first, (second,), scaled, commutes=plain)
    if target in _SUBTRACT:
        return _Sum(
            first, (second,), lambda g: g.call_function(torch.neg, (_scaled(g, second, factor),))
        )
    return None


def _scaled(graph: fx.Graph, value: fx.Node, factor: Any) -> fx.Node:
    if not isinstance(factor, fx.Node) and factor == 1:
        return value
    return graph.call_function(operator.mul, (value, factor))


def _writes(node: fx.Node) -> bool:
    name = str(node.target)
    return node.target in _IN_PLACE or (node.op == "call_method" and name[-1] == "_" != name[-2])


def _is_tensor(value: Any) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and not is_size(value)


def is_size(node: fx.Node) -> bool:
    """Whether a node holds a shape, or what is computed from one, and no value of a tensor."""
    if node.target is getattr:
        return node.args[1] in _SIZES
    if node.op == "call_method":
        return node.target in _SIZES + _FILLS
    if node.op == "call_function" and getattr(node.target, "__name__", "") in _FILLS:
        return True
    inputs = node.all_input_nodes
    plain = getattr(node.target, "__module__", "") in ("_operator", "operator", "math", "builtins")
    return node.op == "call_function" and plain and bool(inputs) and all(map(is_size, inputs))


def _ancestors(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """For each node all that it is computed from, itself included, but for sizes."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if not is_size(source)]
        found[node] = {node}.union(*(found[source] for source in sources))
    return found


def _measures(
    found: _Sum, ancestors: dict[fx.Node, set[fx.Node]], weights: _Weights
) -> list[tuple[bool, int, int]]:
    """Of both terms: detour, weighted layers of its own, their parameters; [] if never residual."""
    terms = [(found.first,), found.other]
    above = [set().union(*(ancestors[node] for node in term)) for term in terms]
    common = above[0] & above[1]
    if not any(ancestor.op == "placeholder" for ancestor in common):
        return []
    measures = []
    for term, sources in zip(terms, above, strict=True):
        own = [w for n in sources - common if (w := weights[n])]
        detour = not _reaches_unweighted(term, common, weights)
        measures.append((detour, len(own), sum(own)))
    return measures if any(count for _, count, _ in measures) else []


def _reaches_unweighted(term: tuple[fx.Node, ...], goal: set[fx.Node], weights: _Weights) -> bool:
    """Whether a path leads from a term back to one of `goal` past no weighted layer."""
    queue = list(term)
    seen = set(queue)
    while queue:
        here = queue.pop()
        if here in goal and here.op != "get_attr":
            return True
        sources = [source for source in here.all_input_nodes if not is_size(source)]
        if weights[here] or any(source.op == "get_attr" and weights[source] for source in sources):
            continue
        queue += [source for source in sources if source not in seen]
        seen.update(sources)
    return False
