"""Rewriting a gated network: one mechanism for live removal in training and for `eps-compact`.

Networks are `torch.fx` graphs. A block is known by the qualified name of its gate, less a trailing
``.gate``: the gate ``stages.0.3.gate`` belongs to the block ``stages.0.3``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from eps_train.errors import GraphError
from eps_train.gate import EpsilonGate
from eps_train.networks import Tap

_GATE_SUFFIX = ".gate"


class _Tracer(fx.Tracer):
    """Keeps gates and taps whole. torch's own modules (BatchNorm, Dropout) are leaves already, so
    nothing that reads `self.training` is frozen into the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (EpsilonGate, Tap)) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """Return `model` as a graph over the same modules and tensors; a graph comes back as it is.

    Raises GraphError when the network's forward pass cannot be traced.
    """
    if isinstance(model, fx.GraphModule):
        return model
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the user's forward() raises on a proxy
        raise GraphError(
            f"{type(model).__name__}: torch.fx cannot trace it ({error}); remove control flow that"
            " depends on tensor values from its forward()"
        ) from error
    return fx.GraphModule(model, graph, type(model).__name__)


def block_name(gate_name: str) -> str:
    return gate_name.removesuffix(_GATE_SUFFIX)


def stage_name(block: str) -> str:
    """The group that a block belongs to: its name up to the last dot."""
    return block.rpartition(".")[0]


def gates(model: nn.Module) -> dict[str, EpsilonGate]:
    """The network's gates by block name, in the order in which they are computed."""
    graph = trace(model)
    modules = dict(graph.named_modules())
    found = {}
    for node in graph.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, EpsilonGate):
            found[block_name(str(node.target))] = module
    return found


def taps(model: nn.Module) -> list[Tap]:
    return [module for module in model.modules() if isinstance(module, Tap)]


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
    return _rewrite(source, lambda m: id(m) in doomed, lambda graph, node: _operand(node, 0))


def drop_gates(model: nn.Module, keep: Iterable[str] = ()) -> fx.GraphModule:
    """Return the network with plain additions in place of its gates, but for those in `keep`."""
    kept = {id(gate) for name, gate in gates(model).items() if name in set(keep)}
    return _rewrite(
        trace(model), lambda m: isinstance(m, EpsilonGate) and id(m) not in kept, _plain_addition
    )


def drop_taps(model: nn.Module) -> fx.GraphModule:
    """Return the network without its taps (identities that only training looks at)."""
    return _rewrite(
        trace(model), lambda m: isinstance(m, Tap), lambda graph, node: _operand(node, 0)
    )


def _operand(node: fx.Node, index: int) -> fx.Node:
    operand = node.args[index]
    assert isinstance(operand, fx.Node)
    return operand


def _plain_addition(graph: fx.Graph, node: fx.Node) -> fx.Node:
    with graph.inserting_before(node):
        return graph.call_function(torch.add, node.args)


def _rewrite(source: fx.GraphModule, matches: Any, replacement: Any) -> fx.GraphModule:
    """Replace each module call that `matches`, then sweep out all that nothing uses any more."""
    graph = fx.Graph()
    output = graph.graph_copy(source.graph, {})
    graph.output(output)
    modules = dict(source.named_modules())
    for node in list(graph.nodes):
        if node.op == "call_module" and matches(modules[str(node.target)]):
            node.replace_all_uses_with(replacement(graph, node))
            graph.erase_node(node)
    rewritten = fx.GraphModule(source, graph, source._get_name())
    rewritten.graph.eliminate_dead_code()
    rewritten.delete_all_unused_submodules()
    rewritten.recompile()
    return rewritten
