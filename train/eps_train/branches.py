"""What each residual branch is worth: the parameters that leave the network with it."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from eps_train import graph
from eps_train.gate import EpsilonGate


def branch_parameters(model: nn.Module) -> dict[str, int]:
    """Learned parameters by block that :func:`graph.remove_blocks` takes out with that block alone.

    Blocks are in the order of computation. Parameters that anything else uses too do not count;
    those that two blocks share leave only when both do, and count for neither.
    """
    traced = graph.trace(model)
    modules = dict(traced.named_modules())
    users = Counter(
        id(parameter)
        for node in traced.graph.nodes
        for parameter in _parameters(traced, node, modules)
    )
    found = {}
    for node in traced.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, EpsilonGate):
            uses: Counter[int] = Counter()
            sizes = {}
            for member in _branch(node):
                for parameter in _parameters(traced, member, modules):
                    uses[id(parameter)] += 1
                    sizes[id(parameter)] = parameter.numel()
            name = graph.block_name(str(node.target))
            found[name] = sum(size for key, size in sizes.items() if uses[key] == users[key])
    return found


def _branch(gate: fx.Node) -> set[fx.Node]:
    """The nodes that nothing but the gate's branch needs."""
    shortcut, branch = gate.all_input_nodes
    members: set[fx.Node] = set()
    waiting = [branch]
    while waiting:
        node = waiting.pop()
        needed = members | {gate} if node is branch else members
        if node.op != "placeholder" and needed.issuperset(node.users):
            members.add(node)
            waiting += [operand for operand in node.all_input_nodes if operand not in members]
    return members - {shortcut}


def _parameters(
    model: fx.GraphModule, node: fx.Node, modules: dict[str, nn.Module]
) -> list[nn.Parameter]:
    if node.op == "call_module":
        return list(modules[str(node.target)].parameters())
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(model.get_submodule(owner), name)
        return [value] if isinstance(value, nn.Parameter) else []
    return []
