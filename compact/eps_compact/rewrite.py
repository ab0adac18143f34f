"""From a gated network to the plain one that it computes in evaluation mode."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import fx, nn

from eps_train import graph


def compact(model: nn.Module, dead: Iterable[str] | None = None) -> fx.GraphModule:
    """Return a plain network without gates and taps that computes what `model` does.

    Dead blocks are taken out (a first block of a stage leaves its shortcut behind), live gates
    become plain additions. The result is in evaluation mode and shares nothing with `model`: it is
    a copy, so training one does not alter the other, and `model` keeps its mode and its gates.

    Args:
        model: any network that torch.fx can trace and whose residual additions are `EpsilonGate`s;
            without gates it comes back as it is, as a graph.
        dead: names of gated blocks to take out besides those whose gates are latched.

    Raises:
        GraphError: `model` cannot be traced, or has no gated block of that name.
    """
    # A graph is copied once it is small; a module is traced as a copy, in evaluation mode alone:
    # what reads `self.training` is frozen as it ships.
    traced = model if isinstance(model, fx.GraphModule) else _trace(model)
    latched = {name for name, gate in graph.gates(traced).items() if bool(gate.dead)}
    less = graph.remove_blocks(traced, latched.union(dead or ()))
    plain = copy.deepcopy(graph.drop_taps(graph.drop_gates(less))).eval()
    plain.zero_grad(set_to_none=True)  # the gradients of the last step are no part of a network
    return plain


def _trace(model: nn.Module) -> fx.GraphModule:
    return graph.trace(copy.deepcopy(model).eval(), one_mode=True)
