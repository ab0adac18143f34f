"""Train ε-ResNets: residual networks whose useless blocks become strict identities.

Public names are loaded on first use, so that importing the package (and `--help`) is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eps_core.errors import EpsError
    from eps_train.gating.gate import EpsilonGate
    from eps_train.gating.rewriting import insert_gates, remove_blocks, ungated
    from eps_train.models.spec import NetworkSpec
    from eps_train.training.checkpoint import Checkpoint

_HOMES = {
    "Checkpoint": "training.checkpoint",
    "EpsError": "eps_core.errors",
    "EpsilonGate": "gating.gate",
    "NetworkSpec": "models.spec",
    "insert_gates": "gating.rewriting",
    "remove_blocks": "gating.rewriting",
    "ungated": "gating.rewriting",
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
    home = _HOMES[name]
    return getattr(import_module(home if "eps_core" in home else f"{__name__}.{home}"), name)
