"""What each residual branch is worth: the parameters that leave the network with it."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from eps_train import graph


def branch_parameters(model: nn.Module) -> dict[str, int]:
    """Learned parameters by block that :func:`graph.remove_blocks` takes out with that block alone.

    Blocks are in the order of computation. Parameters that anything else uses too do not count;
    those that two blocks share leave only when both do, and count for neither.
    """
    traced = graph.without_assertions(model)
    modules = dict(traced.named_modules())
    users = Counter(
        id(parameter)
        for node in traced.graph.nodes
        for parameter in _parameters(traced, node, modules)
    )
    found = {}
    for gate, block in graph.gate_nodes(traced).items():
        uses: Counter[int] = Counter()
        sizes = {}
        for member in branch_nodes(gate):
            for parameter in _parameters(traced, member, modules):
                uses[id(parameter)] += 1
                sizes[id(parameter)] = parameter.numel()
        found[block] = sum(size for key, size in sizes.items() if uses[key] == users[key])
    return found


def branch_nodes(gate: fx.Node) -> list[fx.Node]:
    """The nodes that nothing but the branch of this gate needs, last ones first."""
    _, branch = gate.all_input_nodes
    members: dict[fx.Node, None] = {}
    waiting = [branch]
    while waiting:
        node = waiting.pop()
        needed = {gate} if node is branch else members.keys()
        if node not in members and node.op != "placeholder" and node.users.keys() <= needed:
            members[node] = None
            waiting += node.all_input_nodes
    return list(members)


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
