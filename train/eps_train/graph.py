"""Rewriting a gated network: one mechanism for live removal in training and for `eps-compact`.

Networks are `torch.fx` graphs. A block is known by the qualified name of its gate, less a trailing
``.gate``: the gate ``stages.0.3.gate`` belongs to the block ``stages.0.3``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import fx, nn

from eps_train.aliasing import acts_on_others, one_tensor, written_into
from eps_train.errors import GraphError
from eps_train.gate import EpsilonGate
from eps_train.networks import Tap
from eps_train.residual import Residual, residuals
from eps_train.tracing import free_name, owner
from eps_train.tracing import trace as trace  # the first step of every rewriting

_GATE_NAME = re.compile(r"\.gate(\d*)$")


def block_name(gate_name: str) -> str:
    """`a.gate` belongs to the block `a`; further gates of its module, `a.gate2`, to `a:2`."""
    return _GATE_NAME.sub(lambda match: match[1] and f":{match[1]}", gate_name)


def stage_name(block: str) -> str:
    """The group that a block belongs to: its name up to the last dot."""
    return block.rpartition(".")[0]


def removable(ranked: Iterable[str], live: Iterable[str]) -> list[str]:
    """Those of the blocks `ranked` that may go one after another, in that order.

    A stage keeps one of its `live` blocks: without any it is a step in width and nothing more,
    which a network seldom recovers from. Training to a target and the sweep both go by this.
    """
    left = Counter(map(stage_name, live))
    found = []
    for block in ranked:
        if left[stage_name(block)] > 1:
            left[stage_name(block)] -= 1
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


def insert_gates(model: nn.Module, epsilon: float = 0.0) -> fx.GraphModule:
    """Return the network with an ε-gate in the place of each residual addition.

    Which additions are residual, and which operand is the branch: see `residual.residuals`. The
    gate of an addition in the `forward()` of module `layer1.0` becomes `layer1.0.gate`; further
    ones of the same module `layer1.0.gate2` and so on. Modules and tensors are shared with `model`,
    which is left as it was. With open gates (epsilon 0) the outputs are those of `model`, in
    training and in evaluation.

    Args:
        model: any network that torch.fx can trace; a graph that fx made already is taken as it is,
            so trace in this call rather than before it (fx alone freezes the mode).
        epsilon: threshold of every new gate, in units of its branch's output.

    Raises:
        GraphError: it cannot be traced, or has no residual addition.
    """
    source = trace(model)
    gated = fx.GraphModule(source, _copy(source), source._get_name())
    found = list(residuals(gated))
    if not found:
        raise GraphError(
            f"{type(model).__name__}: has no residual addition (shortcut + branch), so there is"
            " nothing that an ε-gate could take out"
        )
    device = next((parameter.device for parameter in model.parameters()), None)
    for residual in found:
        gate = EpsilonGate(epsilon).to(device).train(source.training)
        _insert_gate(gated, residual, gate)
    gated.delete_all_unused_submodules()
    gated.recompile()
    return gated


def _insert_gate(model: fx.GraphModule, residual: Residual, gate: EpsilonGate) -> None:
    node = residual.node
    path = free_name(model, owner(node), "gate")
    model.add_submodule(path, gate)
    with model.graph.inserting_before(node):
        addition = model.graph.call_module(path, residual.operands)
    addition.meta = node.meta
    if residual.overwritten is not None:
        # An addition in place was also seen by whoever read its operand afterwards.
        nodes = list(model.graph.nodes)
        later = set(nodes[nodes.index(node) + 1 :])
        for same in one_tensor(residual.overwritten, dict(model.named_modules())):
            for user in [user for user in same.users if user in later]:
                user.replace_input_with(same, addition)
    node.replace_all_uses_with(addition)
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
    graph.eliminate_dead_code(lambda node: node.is_impure() or acts_on_others(node, modules))
    return fx.GraphModule(source, graph, source._get_name())  # with the modules that it calls
