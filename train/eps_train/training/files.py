"""Where a run's files are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class RunPaths(NamedTuple):
    """The files of one run, known by the name of its checkpoint: `ckpt`, or `baseline`.

    `best` is the network to use, `last` is there to resume from; `metrics` is for programs,
    `picture` for people, and `config` for `--config`. What is written only on demand lies beside
    them: see :meth:`kept` and :meth:`events`.
    """

    best: Path
    last: Path
    metrics: Path
    picture: Path
    config: Path

    @classmethod
    def of(cls, output: Path, name: str = "") -> RunPaths:
        """Those of the run `name` in the folder `output`; the nameless run writes `ckpt.pt`."""
        prefix = f"{name}-" if name else ""
        return cls(
            best=output / (f"{name}.pt" if name else "ckpt.pt"),
            last=output / f"{prefix}last.pt",
            metrics=output / f"{prefix}metrics.jsonl",
            picture=output / f"{prefix}training.png",
            config=output / f"{prefix}config.json",
        )

    def events(self, epochs_done: int) -> Path:
        """TensorBoard's event file of a run that went on after so many epochs.

        `tensorboard --logdir OUTPUT/tensorboard` shows a run and its baseline in the same charts.
        """
        return self._board / f"events.out.tfevents.{epochs_done:06}"

    def all_events(self) -> list[Path]:
        """What lies at :meth:`events` now, in order."""
        name = re.compile(r"events\.out\.tfevents\.\d{6,}")
        found = self._board.glob("events.out.tfevents.*")
        return sorted(path for path in found if name.fullmatch(path.name))

    def kept(self, epoch: int) -> Path:
        """Where `--keep` leaves the state at the end of the 1-based `epoch`."""
        return self.last.with_name(f"{self._prefix}epoch-{epoch:04}.pt")

    def all_kept(self) -> dict[int, Path]:
        """What lies at :meth:`kept` now, by epoch."""
        name = re.compile(re.escape(self._prefix) + r"epoch-(\d{4,})\.pt")
        found = {}
        for path in self.last.parent.glob(f"{self._prefix}epoch-*.pt"):
            if match := name.fullmatch(path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def all(self) -> list[Path]:
        """Every file that this run could write over, and those that an earlier run left here."""
        return [*self, *self.all_kept().values(), *self.all_events()]

    @property
    def _board(self) -> Path:
        return self.best.parent / "tensorboard" / self.best.stem

    @property
    def _prefix(self) -> str:
        return self.last.name.removesuffix("last.pt")
