"""What torchrun tells a process about itself, in environment variables."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Its number among the processes of the run; 0 without torchrun."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def restarts() -> int:
    """How often torchrun has started the processes again because one had ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if launched() else 0


def on_one_machine() -> bool:
    """Whether all processes of the run are on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
