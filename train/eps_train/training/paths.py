"""Paths of a run's files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

EVENTS_SUFFIX = ".eps-train"  # ends the names of TensorBoard's event files that a run writes


class RunPaths(NamedTuple):
    """Paths of the files of one run, which is named by its checkpoint: `ckpt` or `baseline`.

    `best` is the checkpoint to use and `last` the one to resume from; `metrics` is
    `metrics.jsonl`, `plot` is `training.png`, and `config` is a file for `--config`. Files written
    on request: :meth:`epoch_checkpoint` (`--keep`), and with `--tracker` :attr:`trackers` and the
    folder :attr:`tensorboard`.
    """

    best: Path
    last: Path
    metrics: Path
    plot: Path
    config: Path

    @classmethod
    def of(cls, output: Path, name: str = "") -> RunPaths:
        """Paths of the run `name` in the folder `output`; an unnamed run writes `ckpt.pt`."""
        prefix = f"{name}-" if name else ""
        return cls(
            best=output / (f"{name}.pt" if name else "ckpt.pt"),
            last=output / f"{prefix}last.pt",
            metrics=output / f"{prefix}metrics.jsonl",
            plot=output / f"{prefix}training.png",
            config=output / f"{prefix}config.json",
        )

    @property
    def tensorboard(self) -> Path:
        """Folder of the run's event files.

        `tensorboard --logdir OUTPUT/tensorboard` shows a run and its baseline in the same charts.
        """
        return self.best.parent / "tensorboard" / self.best.stem

    @property
    def trackers(self) -> Path:
        """What the run is called by MLflow and W&B, so that `--resume` continues it there."""
        return self.best.parent / f"{self._prefix}trackers.json"

    def event_files(self) -> list[Path]:
        """Event files that eps-train wrote, oldest first; those of other programs are left out."""
        return sorted(self.tensorboard.glob(f"events.out.tfevents.*{EVENTS_SUFFIX}"))

    def epoch_checkpoint(self, epoch: int) -> Path:
        """Checkpoint that `--keep` writes after the 1-based `epoch`."""
        return self.last.with_name(f"{self._prefix}epoch-{epoch:04}.pt")

    def epoch_checkpoints(self) -> dict[int, Path]:
        """Existing files of :meth:`epoch_checkpoint`, by epoch."""
        name = re.compile(re.escape(self._prefix) + r"epoch-(\d{4,})\.pt")
        found = {}
        for path in self.last.parent.glob(f"{self._prefix}epoch-*.pt"):
            if match := name.fullmatch(path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def all(self) -> list[Path]:
        """Files that this run may write, and those of an earlier run that it would replace."""
        optional = [self.trackers] if self.trackers.exists() else []
        return [*self, *self.epoch_checkpoints().values(), *self.event_files(), *optional]

    @property
    def _prefix(self) -> str:
        return self.last.name.removesuffix("last.pt")
