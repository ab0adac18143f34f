"""Train ε-ResNets: residual networks whose useless blocks become strict identities.

Public names are loaded on first use, so that importing the package (and `--help`) is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eps_train.checkpoint import Checkpoint
    from eps_train.errors import EpsError
    from eps_train.gate import EpsilonGate
    from eps_train.graph import insert_gates, remove_blocks, ungated
    from eps_train.network import NetworkSpec

_HOMES = {
    "Checkpoint": "checkpoint",
    "EpsError": "errors",
    "EpsilonGate": "gate",
    "NetworkSpec": "network",
    "insert_gates": "graph",
    "remove_blocks": "graph",
    "ungated": "graph",
}

__all__ = [
    "Checkpoint",
    "EpsError",
    "EpsilonGate",
    "NetworkSpec",
    "insert_gates",
    "remove_blocks",
    "ungated",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
