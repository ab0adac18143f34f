"""Where a run's files are."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class RunFiles(NamedTuple):
    """The files of one run; `last` is there to resume from, the others are for people to use."""

    best: Path
    last: Path
    metrics: Path
    picture: Path

    @classmethod
    def of(cls, output: Path, name: str = "") -> RunFiles:
        """Those of the run `name` in the folder `output`; the nameless run writes `ckpt.pt`."""
        prefix = f"{name}-" if name else ""
        return cls(
            best=output / (f"{name}.pt" if name else "ckpt.pt"),
            last=output / f"{prefix}last.pt",
            metrics=output / f"{prefix}metrics.jsonl",
            picture=output / f"{prefix}training.png",
        )
