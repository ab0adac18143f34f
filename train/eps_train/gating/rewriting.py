"""Rewrite networks as `torch.fx` graphs: insert ε-gates, remove blocks and gates.

Training and `eps-compact` remove blocks by the same functions. The name of a block is the qualified
name of its gate without the trailing ``.gate``: the gate ``stages.0.3.gate`` belongs to the block
``stages.0.3``.
"""

from __future__ import annotations

import copy
import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby, takewhile
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, fx, nn

from eps_core.errors import GraphError
from eps_train.gating import parity
from eps_train.gating.gate import EpsilonGate
from eps_train.gating.tracing import (
    DRAWS,
    KEPT,
    OTHER_STEPS,
    acts_on_others,
    aliases,
    free_name,
    one_tensor,
    owner,
    writes,
    written_into,
)
from eps_train.gating.tracing import trace as trace  # re-exported: each rewriting starts with it
from eps_train.models.resnets import Tap

# -- Detection of residual additions

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
_SIZES = ("shape", "size", "dim", "ndim", "numel", "__len__")
_FILLS = (  # new tensors that depend on no values of their operand, only on its size
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"),
)

Build = Callable[[fx.Graph], fx.Node]
Shapes = dict[str, tuple[torch.Size, torch.Size]]  # of shortcut and result, by block


@dataclass(frozen=True, slots=True)
class Residual:
    """Residual addition.

    Attributes:
        node: the addition, or with `whole` a module that adds its branch to its input.
        swapped: whether the shortcut is the second operand.
    """

    node: fx.Node
    swapped: bool = False
    whole: bool = False

    def operands(self, graph: fx.Graph) -> tuple[fx.Node, fx.Node]:
        """Return shortcut and branch; adds the operations that compute the branch to `graph`.

        Read from the node each time: an operand may have become the gate of an earlier addition.
        """
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
        """Operand that an in-place addition writes to, or None if the result is a new tensor."""
        operand = self.node.all_input_nodes[0]
        return operand if not self.whole and writes(self.node, operand, {}) else None


@dataclass(frozen=True, slots=True)
class Ungated:
    """Part of a network that has no gate, and the reason.

    Attributes:
        place: qualified name of a module; "" for the network itself.
        reason: clause that follows the place and a colon in messages.
    """

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Sum:
    """Sum of `first` and a second term, which `branch` computes from `other`."""

    first: fx.Node
    other: tuple[fx.Node, ...]
    branch: Build
    commutes: bool = False  # the second term is a node itself, so it may be the shortcut


def residuals(model: fx.GraphModule) -> Iterator[Residual | fx.Node]:
    """Yield the residual additions of a network in the order of computation.

    An addition (`+`, with or without a factor `alpha`, `-`, `addcmul`, `lerp`) is residual if both
    operands are computed from one input of the network and one of them, the branch, has weighted
    layers outside the two operands' common ancestors. The first of these criteria that tells the
    operands apart decides which one is the branch:

    1. the other operand reaches a common ancestor without a weighted layer (identity shortcut);
    2. the branch has more weighted layers outside the common ancestors;
    3. these layers have more parameters.

    If none does, neither operand is a shortcut, and the node itself is yielded in place of a
    `Residual`. Additions of constants, of learned tensors and of sizes are not residual. A tensor
    that depends only on the size of the input does not count as computed from it.
    """
    modules = dict(model.named_modules())
    weights = {
        node: sum(parameter.numel() for parameter in _parameters(model, node, modules))
        for node in model.graph.nodes
    }
    ancestors: dict[fx.Node, set[fx.Node]] = {}  # all nodes that a node is computed from, and it
    for node in model.graph.nodes:
        ancestors[node] = {node}.union(*(ancestors[source] for source in _sources(node)))
    for node in model.graph.nodes:
        found = _sum(node)
        if found is None or not (measures := _measures(found, ancestors, weights)):
            continue
        one, other = measures
        if other > one or (one > other and found.commutes):
            yield Residual(node, swapped=one > other)
        else:
            yield node


def _sum(node: fx.Node) -> _Sum | None:
    """Return the terms of an addition; None for a node that does not add tensors."""
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

        def step(graph: fx.Graph) -> fx.Node:
            return _scaled(graph, graph.call_function(operator.sub, (end, first)), weight)

        return _Sum(first, others, step)
    if len(values) != 2 or not _is_tensor(second := values[1]) or first is second:
        return None
    factor = node.kwargs.get("alpha", 1)

    def scaled(graph: fx.Graph) -> fx.Node:
        return _scaled(graph, second, factor)

    if target in _ADD:
        plain = not isinstance(factor, fx.Node) and bool(factor == 1)
        return _Sum(first, (second,), scaled, commutes=plain)
    if target in _SUBTRACT:
        return _Sum(first, (second,), lambda g: g.call_function(torch.neg, (scaled(g),)))
    return None


def _scaled(graph: fx.Graph, value: fx.Node, factor: Any) -> fx.Node:
    if not isinstance(factor, fx.Node) and factor == 1:
        return value
    return graph.call_function(operator.mul, (value, factor))


def _is_tensor(value: Any) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and not _is_size(value)


def _is_size(node: fx.Node) -> bool:
    """Whether a node's value is computed from shapes only, not from values of a tensor."""
    if node.target is getattr:
        return node.args[1] in _SIZES
    if node.op == "call_method":
        return node.target in _SIZES + _FILLS
    if node.op == "call_function" and getattr(node.target, "__name__", "") in _FILLS:
        return True
    inputs = node.all_input_nodes
    plain = getattr(node.target, "__module__", "") in ("_operator", "operator", "math", "builtins")
    return node.op == "call_function" and plain and bool(inputs) and all(map(_is_size, inputs))


def _sources(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node that are not sizes."""
    return [source for source in node.all_input_nodes if not _is_size(source)]


def _measures(
    found: _Sum, ancestors: Mapping[fx.Node, set[fx.Node]], weights: Mapping[fx.Node, int]
) -> list[tuple[bool, int, int]]:
    """Measure both terms by the criteria of :func:`residuals`; [] if the sum is not residual.

    Each measure is: no path to a common ancestor without a weighted layer; number of weighted
    layers outside the common ancestors; number of their parameters.
    """
    terms = [(found.first,), found.other]
    upstream = [set().union(*(ancestors[node] for node in term)) for term in terms]
    common = upstream[0] & upstream[1]
    if not any(ancestor.op == "placeholder" for ancestor in common):
        return []
    measures = []
    for term, sources in zip(terms, upstream, strict=True):
        own = [w for n in sources - common if (w := weights[n])]
        detour = not _reaches_unweighted(term, common, weights)
        measures.append((detour, len(own), sum(own)))
    return measures if any(count for _, count, _ in measures) else []


def _reaches_unweighted(
    term: tuple[fx.Node, ...], goal: set[fx.Node], weights: Mapping[fx.Node, int]
) -> bool:
    """Whether a path without a weighted layer leads from a term back to a node of `goal`."""
    queue = list(term)
    seen = set(queue)
    while queue:
        here = queue.pop()
        if here in goal and here.op != "get_attr":
            return True
        sources = _sources(here)
        if weights[here] or any(source.op == "get_attr" and weights[source] for source in sources):
            continue
        queue += [source for source in sources if source not in seen]
        seen.update(sources)
    return False


# -- Blocks, their gates and their stages

_GATE_NAME = re.compile(r"[._]gate(\d*)$")  # `layer_gate` is the gate of `layer`, kept whole
UNGATED = "ungated"  # key of `GraphModule.meta`: a list of Ungated
_BROADCAST = "its shortcut is broadcast over the sum"


def block_name(gate_name: str) -> str:
    """Return the name of a gate's block: `a` for `a.gate`, and `a:2` for `a.gate2`."""
    return _GATE_NAME.sub(lambda match: match[1] and f":{match[1]}", gate_name)


def stage_name(block: str) -> str:
    """Return the name of a block up to its last dot."""
    return block.rpartition(".")[0]


def removable(ranked: Iterable[str], live: Iterable[str], stages: Mapping[str, str]) -> list[str]:
    """Return the blocks of `ranked` that may be removed one after another, in that order.

    Each stage keeps at least one of its `live` blocks, since networks seldom recover from the loss
    of a whole stage. Training to a target and the sweep both use this rule.

    Args:
        ranked: block names, in the order of removal.
        live: names of all blocks that are not removed yet.
        stages: stage of each block, from :func:`stages`.
    """
    left = Counter(stages[block] for block in live)
    found = []
    for block in ranked:
        if left[stages[block]] > 1:
            left[stages[block]] -= 1
            found.append(block)
    return found


def gates(model: nn.Module) -> dict[str, EpsilonGate]:
    """Return the gates of a network by block name, in the order of computation."""
    traced = trace(model)
    return {
        block: cast(EpsilonGate, traced.get_submodule(str(node.target)))
        for node, block in gate_nodes(traced).items()
    }


def gate_nodes(model: fx.GraphModule) -> dict[fx.Node, str]:
    """Return the nodes of the gates with the names of their blocks, in the order of computation."""
    modules = dict(model.named_modules())
    return {
        node: block_name(str(node.target))
        for node in model.graph.nodes
        if node.op == "call_module" and isinstance(modules.get(str(node.target)), EpsilonGate)
    }


def taps(model: nn.Module) -> list[Tap]:
    return [module for module in model.modules() if isinstance(module, Tap)]


# -- Insertion of gates


def insert_gates(
    model: nn.Module, epsilon: float = 0.0, *, example: Tensor | None = None
) -> fx.GraphModule:
    """Return the network as a graph with an ε-gate in place of each residual addition.

    :func:`residuals` defines which additions are residual, and which operand is the branch. The
    gate of an addition in the `forward()` of module `layer1.0` is named `layer1.0.gate`; further
    gates of that module are `layer1.0.gate2` and so on. Modules and tensors are shared with
    `model`, which does not change. :func:`ungated` lists the parts without a gate.

    Both networks run on random inputs: with open gates, outputs, gradients and buffers must equal
    those of `model`, in training and in evaluation mode.

    Args:
        model: any network that torch.fx can trace. A graph is used unchanged; pass the untraced
            network where possible, since `fx.symbolic_trace` freezes the mode.
        epsilon: threshold of every new gate, in units of its branch's output.
        example: a batch of at least 2 inputs for the comparison; floating-point values are replaced
            by random ones. By default its shape is derived from the first layer; if no such shape
            fits, or `model` is a graph or on the meta device, the networks are not compared.

    Raises:
        GraphError: the network cannot be traced, has no residual addition, or the gated network
            differs from it.
    """
    gated = add_gates(model, epsilon)
    if isinstance(model, fx.GraphModule) and example is None:
        return gated
    if example is None:
        example = parity.example_for(model)
    if example is not None:
        shapes: Shapes = {}
        parity.refuse_difference(model, gated, example, partial(_record_shapes, shapes))
        gated = without_broadcasts(gated, _broadcasts(shapes))
    return gated


def add_gates(model: nn.Module, epsilon: float = 0.0) -> fx.GraphModule:
    """Insert gates like :func:`insert_gates`, but without running the network."""
    source = trace(model)
    gated = _module(source, _copy(source))
    device = next((parameter.device for parameter in model.parameters()), None)
    found = [*residuals(gated), *_whole_blocks(gated)]
    skipped = _kept_whole(gated, {str(r.node.target) for r in found if isinstance(r, Residual)})
    for each in found:
        if isinstance(each, fx.Node):
            skipped.append(Ungated(owner(each), "neither operand of an addition is a shortcut"))
        elif _is_shared(each, dict(gated.named_modules())):
            skipped.append(Ungated(owner(each.node), "adds into a tensor that is used elsewhere"))
        else:
            _insert_gate(gated, each, EpsilonGate(epsilon).to(device).train(source.training))
    gated.meta[UNGATED] = skipped
    _refuse_none(gated)
    gated.delete_all_unused_submodules()
    gated.recompile()
    return gated


def _refuse_none(model: fx.GraphModule) -> None:
    """Raise GraphError if a network has no gates; the message lists the ungated parts."""
    if not gate_nodes(model):
        skipped = "; ".join(told(ungated(model)))
        raise GraphError(
            f"{model._get_name()}: has no residual addition (shortcut + branch), so there is"
            f" nothing that an ε-gate could take out{skipped and f' ({skipped})'}"
        )


def ungated(model: fx.GraphModule) -> tuple[Ungated, ...]:
    """Return the parts of a network from :func:`insert_gates` without a gate, with the reasons.

    These are modules kept whole, because a graph would lose part of their code, and additions that
    are not residual or whose shortcut cannot replace the sum.
    """
    return tuple(model.meta.get(UNGATED, ()))


def told(parts: Iterable[Ungated]) -> list[str]:
    """Format ungated parts: one line per reason, with its first place and the number of others."""
    places: dict[str, list[str]] = {}
    for part in parts:
        places.setdefault(part.reason, []).append(part.place or "the network itself")
    return [
        f"{each[0]}{f' and {len(each) - 1} more' if len(each) > 1 else ''}: {reason}"
        for reason, each in places.items()
    ]


def broadcasts(model: fx.GraphModule, example: Tensor) -> tuple[str, ...]:
    """Return the blocks whose shortcut differs in shape from the sum, so cannot replace it."""
    return _broadcasts(gate_shapes(model, example))


def _broadcasts(shapes: Shapes) -> tuple[str, ...]:
    return tuple(block for block, (shortcut, result) in shapes.items() if shortcut != result)


def without_broadcasts(model: fx.GraphModule, blocks: Collection[str]) -> fx.GraphModule:
    """Replace the gates of blocks from :func:`broadcasts` by plain additions.

    They are added to :func:`ungated`. Raises GraphError if no gate is left.
    """
    if not blocks:
        return model
    plain = drop_gates(model, keep=gates(model).keys() - set(blocks))
    plain.meta[UNGATED] = [*ungated(model), *(Ungated(block, _BROADCAST) for block in blocks)]
    _refuse_none(plain)
    return plain


def gate_shapes(model: fx.GraphModule, example: Tensor) -> Shapes:
    """Return the shapes of shortcut and result of each gate, by block, for inputs like `example`.

    Exceptions of the forward pass are not caught.
    """
    found: Shapes = {}
    if gate_nodes(model):
        parity.dry_run(model, example, partial(_record_shapes, found), training=False)
    return {block: found[block] for block in gates(model)}


def _record_shapes(found: Shapes, model: fx.GraphModule) -> None:
    """Have the gates of `model` write their shapes into `found` whenever they run."""

    def record(block: str, gate: nn.Module, operands: Any, result: Tensor) -> None:
        found[block] = operands[0].shape, result.shape

    for block, gate in gates(model).items():
        gate.register_forward_hook(partial(record, block))


def stages(model: fx.GraphModule, input_shape: tuple[int, int, int]) -> dict[str, str]:
    """Return the stage of each gated block: consecutive blocks with results of the same shape.

    The name of a stage is the common prefix of its blocks' names, or the name of its first block.
    """
    example = torch.zeros((1, *input_shape))
    results = {block: result for block, (_, result) in gate_shapes(model, example).items()}
    named: dict[str, str] = {}
    for _, members in groupby(results, key=results.__getitem__):
        row = list(members)
        parts = zip(*(block.split(".") for block in row), strict=False)
        common = [part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts)]
        name = ".".join(common) if len(row) > 1 else stage_name(row[0])
        named |= dict.fromkeys(row, name if name and name not in named.values() else row[0])
    return named


def _kept_whole(model: fx.GraphModule, gated: set[str]) -> list[Ungated]:
    called = {str(node.target) for node in model.graph.nodes if node.op == "call_module"} - gated
    return [
        Ungated(path, f"kept whole, for it {reason}")
        for path, reason in model.meta.get(KEPT, {}).items()
        if path in called and any(p.dim() > 1 for p in model.get_submodule(path).parameters())
    ]


def _whole_blocks(model: fx.GraphModule) -> Iterator[Residual]:
    """Yield the modules kept whole that are residual blocks (hand-written stochastic depth, say).

    In evaluation such a module returns its input plus a branch. In training its code decides, and
    the branch is the difference between its result and its input.
    """
    kept = model.meta.get(KEPT, {})
    for node in model.graph.nodes:
        if node.op != "call_module" or kept.get(node.target) not in (DRAWS, OTHER_STEPS):
            continue
        if len(node.all_input_nodes) != 1 or node.args != tuple(node.all_input_nodes):
            continue
        try:
            inner = trace(copy.deepcopy(model.get_submodule(node.target)).eval(), one_mode=True)
        except GraphError:
            continue
        output = inner.graph.output_node().args[0]
        for found in residuals(inner):
            if isinstance(found, Residual) and found.node is output:
                shortcut, _ = found.operands(fx.Graph())
                if shortcut.op == "placeholder":
                    yield Residual(node, whole=True)


def _is_shared(found: Residual, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an in-place addition is read later through an alias of the operand it writes to."""
    if found.overwritten is None:
        return False
    later = set(_after(found.node))
    others = aliases(found.overwritten, modules).difference(
        one_tensor(found.overwritten, modules), {found.node}, later
    )
    return any(later.intersection(alias.users) for alias in others)


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node


def _insert_gate(model: fx.GraphModule, residual: Residual, gate: EpsilonGate) -> None:
    node = residual.node
    place, name = owner(node), "gate"
    if residual.whole:  # the gate goes beside the user's module, not into it
        place, _, last = str(node.target).rpartition(".")
        name = f"{last}_gate"
    path = free_name(model, place, name)
    model.add_submodule(path, gate)
    readers = list(node.users)
    with model.graph.inserting_before(node.next if residual.whole else node):
        addition = model.graph.call_module(path, residual.operands(model.graph))
    addition.meta = node.meta
    if residual.overwritten is not None:
        # Later readers of the operand of an in-place addition read its result.
        later = set(_after(node))
        for same in one_tensor(residual.overwritten, dict(model.named_modules())):
            for user in later.intersection(same.users):
                user.replace_input_with(same, addition)
    for reader in readers:
        reader.replace_input_with(node, addition)
    if not residual.whole:
        model.graph.erase_node(node)


# -- Removal of blocks and gates


def remove_blocks(model: nn.Module, names: Iterable[str]) -> fx.GraphModule:
    """Return the network without the named blocks: each gate is replaced by its shortcut.

    Modules and tensors that only the removed branches used are removed too. The others are shared
    with `model`, which does not change; hooks and the training mode are kept.

    Args:
        model: a network with gates, an `nn.Module` or a graph.
        names: names of blocks that :func:`gates` lists; their order does not matter.

    Raises:
        GraphError: a name is not that of a gated block of this network.
    """
    source = trace(model)
    wanted = set(names)
    present = gates(source)
    unknown = sorted(wanted - present.keys())
    if unknown:
        known = ", ".join(present) or "none"
        raise GraphError(
            f"no gated block named {', '.join(unknown)}; the gated blocks are: {known}"
        )
    removed = {id(present[name]) for name in wanted}
    return _rewrite(source, lambda m: id(m) in removed, _shortcut)


def remove_blocks_in_place(model: fx.GraphModule, names: Iterable[str]) -> None:
    """Remove blocks like :func:`remove_blocks`, from `model` itself.

    What holds `model` (a loop's variable, a module around it, `torch.compile`) runs what is left.
    Modules and tensors of the removed branches are no longer part of it.
    """
    less = remove_blocks(model, names)
    model._modules, model._parameters = less._modules, less._parameters
    model._buffers = less._buffers
    model._non_persistent_buffers_set = less._non_persistent_buffers_set
    model.graph = less.graph  # which recompiles


def drop_gates(model: nn.Module, keep: Iterable[str] = ()) -> fx.GraphModule:
    """Return the network with plain additions in place of its gates, except those in `keep`."""
    names = set(keep)  # an iterator can be read only once
    kept = {id(gate) for name, gate in gates(model).items() if name in names}
    return _rewrite(
        trace(model), lambda m: isinstance(m, EpsilonGate) and id(m) not in kept, _plain_addition
    )


def drop_taps(model: nn.Module) -> fx.GraphModule:
    """Return the network without its taps, the identities whose outputs only training reads."""
    return _rewrite(
        trace(model), lambda m: isinstance(m, Tap), lambda graph, node, modules: _first(node)
    )


def _first(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def _shortcut(graph: fx.Graph, node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node:
    """Return the node that replaces a removed gate: its shortcut, or a clone of it.

    The result of a gate is a new tensor. If a later node overwrites it, the shortcut must be
    cloned, since other nodes or autograd may read it.
    """
    if not written_into(node, modules):
        return _first(node)
    with graph.inserting_before(node):
        return graph.call_function(torch.clone, (_first(node),))


def _plain_addition(graph: fx.Graph, node: fx.Node, modules: object) -> fx.Node:
    with graph.inserting_before(node):
        return graph.call_function(torch.add, node.args)


def _copy(source: fx.GraphModule) -> fx.Graph:
    """Return a copy of the graph over the same modules and tensors."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(source.graph, {}))
    graph.owning_module = source  # dead code elimination looks up modules in it
    return graph


def _rewrite(
    source: fx.GraphModule,
    matches: Callable[[nn.Module], bool],
    replacement: Callable[[fx.Graph, fx.Node, Mapping[str, nn.Module]], fx.Node],
) -> fx.GraphModule:
    """Replace each module call for which `matches` is true, then eliminate dead code."""
    graph = _copy(source)
    modules = dict(source.named_modules())
    for node in list(graph.nodes):
        if node.op == "call_module" and matches(modules[str(node.target)]):
            node.replace_all_uses_with(replacement(graph, node, modules))
            graph.erase_node(node)
    # An assertion must not keep the nodes that it checks.
    graph.eliminate_dead_code(
        lambda node: (
            node.target is not torch._assert and (node.is_impure() or acts_on_others(node, modules))
        )
    )
    return _module(source, graph)


def _module(source: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """Return `graph` as a module, with the modules that it calls and the metadata of `source`."""
    model = fx.GraphModule(source, graph, source._get_name())
    model.meta |= source.meta
    return model


# -- Parameters of branches


def branch_parameters(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters that :func:`remove_blocks` removes with each single block.

    Blocks are in the order of computation. Parameters that other parts of the network use as well,
    another block included, are not counted.
    """
    traced = _rewrite(trace(model), lambda m: False, _plain_addition)  # without assertions
    modules = dict(traced.named_modules())
    users = Counter(
        id(parameter)
        for node in traced.graph.nodes
        for parameter in _parameters(traced, node, modules)
    )
    found = {}
    for gate, block in gate_nodes(traced).items():
        own = [p for n in branch_nodes(gate) for p in _parameters(traced, n, modules)]
        uses = Counter(map(id, own))
        sizes = {id(p): p.numel() for p in own}
        found[block] = sum(size for key, size in sizes.items() if uses[key] == users[key])
    return found


def branch_nodes(gate: fx.Node) -> list[fx.Node]:
    """Return the nodes that only the branch of this gate uses, last ones first."""
    _, branch = gate.all_input_nodes
    members: dict[fx.Node, None] = {}
    queue = [branch]
    while queue:
        node = queue.pop()
        needed = {gate} if node is branch else members.keys()
        if node not in members and node.op != "placeholder" and node.users.keys() <= needed:
            members[node] = None
            queue += node.all_input_nodes
    return list(members)


def _parameters(
    model: fx.GraphModule, node: fx.Node, modules: Mapping[str, nn.Module]
) -> list[nn.Parameter]:
    """The parameters that a node uses."""
    if node.op == "call_module":
        return list(modules[str(node.target)].parameters())
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(model.get_submodule(owner), name)
        return [value] if isinstance(value, nn.Parameter) else []
    return []
