"""Rewriting a gated network: one mechanism for live removal in training and for `eps-compact`.

Networks are `torch.fx` graphs. A block is known by the qualified name of its gate, less a trailing
``.gate``: the gate ``stages.0.3.gate`` belongs to the block ``stages.0.3``.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby, takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn

from eps_train import parity
from eps_train.aliasing import acts_on_others, aliases, one_tensor, written_into
from eps_train.errors import GraphError
from eps_train.gate import EpsilonGate
from eps_train.networks import Tap
from eps_train.residual import Residual, Ungated, residuals
from eps_train.tracing import DRAWS, KEPT, OTHER_STEPS, free_name, owner
from eps_train.tracing import trace as trace  # the first step of every rewriting

_GATE_NAME = re.compile(r"[._]gate(\d*)$")  # `_gate` beside a module that is kept whole
UNGATED = "ungated"  # key of `GraphModule.meta`
BROADCAST = "its shortcut is broadcast over the sum"


def block_name(gate_name: str) -> str:
    """`a.gate` belongs to the block `a`; further gates of its module, `a.gate2`, to `a:2`."""
    return _GATE_NAME.sub(lambda match: match[1] and f":{match[1]}", gate_name)


def stage_name(block: str) -> str:
    """The group that a block belongs to: its name up to the last dot."""
    return block.rpartition(".")[0]


def removable(ranked: Iterable[str], live: Iterable[str], stages: Mapping[str, str]) -> list[str]:
    """Those of the blocks `ranked` that may go one after another, in that order.

    A stage keeps one of its `live` blocks: without any it is a step in width and nothing more,
    which a network seldom recovers from. Training to a target and the sweep both go by this;
    `stages` is as :func:`stages` has them.
    """
    left = Counter(stages[block] for block in live)
    found = []
    for block in ranked:
        if left[stages[block]] > 1:
            left[stages[block]] -= 1
            found.append(block)
    return found


def gates(model: nn.Module) -> dict[str, EpsilonGate]:
    """The network's gates by block name, in the order in which they are computed."""
    traced = trace(model)
    found = {}
    for node, block in gate_nodes(traced).items():
        gate = traced.get_submodule(str(node.target))
        assert isinstance(gate, EpsilonGate)
        found[block] = gate
    return found


def gate_nodes(model: fx.GraphModule) -> dict[fx.Node, str]:
    """The nodes of the gates and the names of their blocks, in the order of computation."""
    modules = dict(model.named_modules())
    return {
        node: block_name(str(node.target))
        for node in model.graph.nodes
        if node.op == "call_module" and isinstance(modules.get(str(node.target)), EpsilonGate)
    }


def taps(model: nn.Module) -> list[Tap]:
    return [module for module in model.modules() if isinstance(module, Tap)]


def insert_gates(
    model: nn.Module, epsilon: float = 0.0, *, example: Tensor | None = None
) -> fx.GraphModule:
    """Return the network with an ε-gate in the place of each residual addition.

    Which additions are residual, and which operand is the branch: see `residual.residuals`. The
    gate of an addition in the `forward()` of module `layer1.0` becomes `layer1.0.gate`; further
    ones of the same module `layer1.0.gate2` and so on. Modules and tensors are shared with `model`,
    which is left as it was. What gets no gate, and why, tells :func:`ungated`.

    Both networks are run on random inputs: with open gates outputs, gradients and buffers are those
    of `model`, in training and in evaluation, or it is refused.

    Args:
        model: any network that torch.fx can trace; a graph that fx made already is taken as it is,
            so trace in this call rather than before it (fx alone freezes the mode).
        epsilon: threshold of every new gate, in units of its branch's output.
        example: a batch of at least 2 inputs for the comparison; of floats only shape and type
            count. Without it one is made up from the first layer; where none fits, as for a
            network on the meta device, nothing is compared.

    Raises:
        GraphError: it cannot be traced, has no residual addition, or would not do the same.
    """
    gated = add_gates(model, epsilon)
    if isinstance(model, fx.GraphModule) and example is None:
        return gated
    if example is None:
        example = parity.example_for(model)
    if example is not None:
        parity.refuse_difference(model, gated, example)
        gated = without_gates(gated, broadcasts(gated, example), BROADCAST)
        refuse_none(gated)
    return gated


def add_gates(model: nn.Module, epsilon: float = 0.0) -> fx.GraphModule:
    """As :func:`insert_gates`, without running anything."""
    source = trace(model)
    gated = _module(source, _copy(source))
    device = next((parameter.device for parameter in model.parameters()), None)
    found = [*residuals(gated), *_whole_blocks(gated)]
    left = _kept_whole(gated, {str(r.node.target) for r in found if isinstance(r, Residual)})
    for each in found:
        if isinstance(each, fx.Node):
            left.append(Ungated(owner(each), "neither operand of an addition is a shortcut"))
        elif _is_shared(each, dict(gated.named_modules())):
            left.append(Ungated(owner(each.node), "adds into a tensor that is used elsewhere"))
        else:
            _insert_gate(gated, each, EpsilonGate(epsilon).to(device).train(source.training))
    gated.meta[UNGATED] = left
    refuse_none(gated)
    gated.delete_all_unused_submodules()
    gated.recompile()
    return gated


def refuse_none(model: fx.GraphModule) -> None:
    """Raise GraphError for a network without gates, with what got none."""
    if not gate_nodes(model):
        left = "; ".join(told(ungated(model)))
        raise GraphError(
            f"{model._get_name()}: has no residual addition (shortcut + branch), so there is"
            f" nothing that an ε-gate could take out{left and f' ({left})'}"
        )


def ungated(model: fx.GraphModule) -> tuple[Ungated, ...]:
    """The parts of a network from :func:`insert_gates` that got no gate, and why.

    They are modules that are kept whole, because a graph would lose something of their code, and
    additions that are not residual or whose shortcut cannot stand for the sum.
    """
    return tuple(model.meta.get(UNGATED, ()))


def told(left: Iterable[Ungated]) -> list[str]:
    """One line for each reason, with the first place that it holds for and how many there are."""
    places: dict[str, list[str]] = {}
    for part in left:
        places.setdefault(part.reason, []).append(part.place or "the network itself")
    return [
        f"{each[0]}{f' and {len(each) - 1} more' if len(each) > 1 else ''}: {reason}"
        for reason, each in places.items()
    ]


def broadcasts(model: fx.GraphModule, example: Tensor) -> tuple[str, ...]:
    """The blocks whose shortcut has another shape than their sum, and so cannot stand for it."""
    shapes = gate_shapes(model, example)
    return tuple(block for block, (shortcut, result) in shapes.items() if shortcut != result)


def without_gates(model: fx.GraphModule, blocks: Iterable[str], reason: str) -> fx.GraphModule:
    """Plain additions in place of these gates; :func:`ungated` gives the reason."""
    if not (gone := list(blocks)):
        return model
    plain = drop_gates(model, keep=gates(model).keys() - set(gone))
    plain.meta[UNGATED] = [*ungated(model), *(Ungated(block, reason) for block in gone)]
    return plain


def gate_shapes(model: fx.GraphModule, example: Tensor) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Shapes of shortcut and result of each gate for a batch of `example`'s shape, by block.

    What its forward pass raises is not caught.
    """
    found: dict[str, tuple[torch.Size, torch.Size]] = {}
    if not gate_nodes(model):
        return found

    def watch(network: fx.GraphModule) -> None:
        for block, gate in gates(network).items():
            gate.register_forward_hook(partial(note, block))

    def note(block: str, gate: nn.Module, operands: Any, result: Tensor) -> None:
        found[block] = operands[0].shape, result.shape

    parity.dry_run(model, example, watch, training=False)
    return {block: found[block] for block in gates(model)}


def stages(model: fx.GraphModule, input_shape: tuple[int, int, int]) -> dict[str, str]:
    """The stage of each gated block: neighbours in a row whose results have one shape.

    A stage is called by what the names of its blocks have in common, or by its first block.
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
    """Modules with weights whose inside is not followed, but for those with a gate beside them."""
    called = {str(node.target) for node in model.graph.nodes if node.op == "call_module"} - gated
    return [
        Ungated(path, f"kept whole, for it {reason}")
        for path, reason in model.meta.get(KEPT, {}).items()
        if path in called and any(p.dim() > 1 for p in model.get_submodule(path).parameters())
    ]


def _whole_blocks(model: fx.GraphModule) -> Iterator[Residual]:
    """Modules kept whole that are a residual block all the same: stochastic depth by hand, say.

    In evaluation such a module returns its input plus a branch; in training it returns whatever
    its code decides, and what that is more than its input is its branch.
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
    """Whether an addition in place is seen through another name of the tensor that it writes to."""
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
    if residual.whole:  # the module itself is the user's
        place, _, last = str(node.target).rpartition(".")
        name = f"{last}_gate"
    path = free_name(model, place, name)
    model.add_submodule(path, gate)
    readers = list(node.users)
    with model.graph.inserting_before(node.next if residual.whole else node):
        addition = model.graph.call_module(path, residual.operands(model.graph))
    addition.meta = node.meta
    if residual.overwritten is not None:
        # An addition in place was also seen by whoever read its operand afterwards.
        later = set(_after(node))
        for same in one_tensor(residual.overwritten, dict(model.named_modules())):
            for user in later.intersection(same.users):
                user.replace_input_with(same, addition)
    for reader in readers:
        reader.replace_input_with(node, addition)
    if not residual.whole:
        model.graph.erase_node(node)


def remove_blocks(model: nn.Module, names: Iterable[str]) -> fx.GraphModule:
    """Return the network without the named blocks: each gate becomes its shortcut.

    Whatever only those branches used goes with them. Modules and tensors that stay are shared with
    `model`, which is left as it was; so are hooks and the training mode.

    Args:
        model: a network with gates, an `nn.Module` or a graph.
        names: names of blocks that :func:`gates` lists; their order does not matter.

    Raises:
        GraphError: a name that is no gated block of this network.
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
    doomed = {id(present[name]) for name in wanted}
    return _rewrite(source, lambda m: id(m) in doomed, _shortcut)


def drop_gates(model: nn.Module, keep: Iterable[str] = ()) -> fx.GraphModule:
    """Return the network with plain additions in place of its gates, but for those in `keep`."""
    names = set(keep)  # once: an iterator would be empty after the first look
    kept = {id(gate) for name, gate in gates(model).items() if name in names}
    return _rewrite(
        trace(model), lambda m: isinstance(m, EpsilonGate) and id(m) not in kept, _plain_addition
    )


def drop_taps(model: nn.Module) -> fx.GraphModule:
    """Return the network without its taps (identities that only training looks at)."""
    return _rewrite(
        trace(model), lambda m: isinstance(m, Tap), lambda graph, node, modules: _first(node)
    )


def without_assertions(model: nn.Module) -> fx.GraphModule:
    """Return the network without what nothing uses, and what only `torch._assert` looks at."""
    return _rewrite(trace(model), lambda m: False, _plain_addition)


def _first(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def _shortcut(graph: fx.Graph, node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node:
    """What stands for a removed gate: its shortcut, or a copy of it.

    A gate's result was a new tensor. Where the next step overwrites it, the shortcut must not be
    handed over: others may read it, and autograd does.
    """
    if not written_into(node, modules):
        return _first(node)
    with graph.inserting_before(node):
        return graph.call_function(torch.clone, (_first(node),))


def _plain_addition(graph: fx.Graph, node: fx.Node, modules: object) -> fx.Node:
    with graph.inserting_before(node):
        return graph.call_function(torch.add, node.args)


def _copy(source: fx.GraphModule) -> fx.Graph:
    """Another graph over the same modules and tensors."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(source.graph, {}))
    graph.owning_module = source  # which tells what may be swept out
    return graph


def _rewrite(
    source: fx.GraphModule,
    matches: Callable[[nn.Module], bool],
    replacement: Callable[[fx.Graph, fx.Node, Mapping[str, nn.Module]], fx.Node],
) -> fx.GraphModule:
    """Replace each module call that `matches`, then sweep out all that nothing uses any more."""
    graph = _copy(source)
    modules = dict(source.named_modules())
    for node in list(graph.nodes):
        if node.op == "call_module" and matches(modules[str(node.target)]):
            node.replace_all_uses_with(replacement(graph, node, modules))
            graph.erase_node(node)
    # An assertion computes nothing, and must not keep what it looks at.
    graph.eliminate_dead_code(
        lambda node: (
            node.target is not torch._assert and (node.is_impure() or acts_on_others(node, modules))
        )
    )
    return _module(source, graph)


def _module(source: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A graph as a module, with what it calls of `source` and what is known of that."""
    model = fx.GraphModule(source, graph, source._get_name())
    model.meta |= source.meta
    return model
