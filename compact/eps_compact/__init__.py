"""Compaction of trained ε-ResNets: removal of dead blocks and gates, with proof of equal logits.

Public names are imported on first use, so that importing the package (and `--help`) is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eps_compact.artifact import CompactArtifact, load
    from eps_compact.certificate import ProofError
    from eps_compact.compaction import Compaction, compact, compact_pruner

_HOMES = {
    "CompactArtifact": "artifact",
    "Compaction": "compaction",
    "ProofError": "certificate",
    "compact": "compaction",
    "compact_pruner": "compaction",
    "load": "artifact",
}

__all__ = ["CompactArtifact", "Compaction", "ProofError", "compact", "compact_pruner", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
