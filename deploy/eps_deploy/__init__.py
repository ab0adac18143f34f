"""Deploy compact networks: ONNX, inference engines, proof of parity, honest latency, one bundle.

Public names are loaded on first use, so that importing the package (and `--help`) is instant.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eps_deploy.bundle import Bundle, load_bundle
    from eps_deploy.pipeline.pipeline import deploy

# ONNX Runtime reports on its use by default (Privacy.md in its wheel); what is deployed with this
# package does not, unless its owner wants it to. It is read when onnxruntime is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {"Bundle": "bundle", "deploy": "pipeline.pipeline", "load_bundle": "bundle"}

__all__ = ["Bundle", "deploy", "load_bundle"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
