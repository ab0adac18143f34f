"""Train ε-ResNets: residual networks whose redundant blocks become strict identities.

Public names are imported on first use, so that importing the package (and `--help`) is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eps_core.errors import EpsError
    from eps_train.gating.gate import EpsilonGate
    from eps_train.gating.pruner import BlockPruner
    from eps_train.gating.rewriting import insert_gates, remove_blocks, ungated
    from eps_train.gating.targets import Flops, Latency, Parameters
    from eps_train.models.spec import NetworkSpec
    from eps_train.training.checkpoint import Checkpoint

_MODULES = {
    "BlockPruner": "eps_train.gating.pruner",
    "Checkpoint": "eps_train.training.checkpoint",
    "EpsError": "eps_core.errors",
    "EpsilonGate": "eps_train.gating.gate",
    "Flops": "eps_train.gating.targets",
    "Latency": "eps_train.gating.targets",
    "NetworkSpec": "eps_train.models.spec",
    "Parameters": "eps_train.gating.targets",
    "insert_gates": "eps_train.gating.rewriting",
    "remove_blocks": "eps_train.gating.rewriting",
    "ungated": "eps_train.gating.rewriting",
}

__all__ = [
    "BlockPruner",
    "Checkpoint",
    "EpsError",
    "EpsilonGate",
    "Flops",
    "Latency",
    "NetworkSpec",
    "Parameters",
    "insert_gates",
    "remove_blocks",
    "ungated",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
