"""Progress of a run: a line for each epoch, the block map, and `metrics.jsonl`."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn

from eps_core.errors import FileFormatError, naming
from eps_core.files import replace_file
from eps_train.gating.rewriting import stage_name
from eps_train.training.checkpoint import GateRecord
from eps_train.training.evaluate import EpochMetrics

LEGEND = "█ alive  ▒ sometimes closed  ░ closed all epoch  · dead"
_NAMES_WIDTH = 60  # columns for the names of the blocks that died
RECENT = 5  # epochs that predict the time left: an epoch gets shorter when blocks are removed


def block_map(records: Iterable[GateRecord], width: int | None = None) -> str:
    """The network as a strip of one character a block, a space between stages; see `LEGEND`.

    Where that is more than `width` characters, each stands for several neighbours in a stage, and
    shows the one that is most alive: a stretch is dead when all of it is.
    """

    def symbol(record: GateRecord) -> str:
        if record.death is not None:
            return "·"
        if not record.closed_steps:
            return "█"
        return "░" if record.closed_steps == record.steps else "▒"

    stages = [
        "".join(map(symbol, members))
        for _, members in groupby(records, key=lambda record: stage_name(record.block))
    ]
    share = 1
    while width is not None and share < max(map(len, stages), default=0):
        if len(stages) - 1 + sum(-(-len(stage) // share) for stage in stages) <= width:
            break
        share += 1
    return " ".join(
        "".join(min(stage[at : at + share], key="█▒░·".index) for at in range(0, len(stage), share))
        for stage in stages
    )


class MetricsLog:
    """`metrics.jsonl`: one JSON object for each epoch, appended and flushed.

    A resumed run removes the epochs that it is about to repeat.

    Args:
        epochs_done: epochs that a resumed run has behind it; 0 starts the file anew.
        parameters: of the network with all its blocks.
    """

    def __init__(self, path: Path, *, epochs_done: int, parameters: int) -> None:
        self.path, self._parameters = path, parameters
        kept = _lines_up_to(path, epochs_done) if epochs_done and path.exists() else []
        replace_file(path, "".join(kept).encode())

    def append(self, metrics: EpochMetrics) -> dict[str, Any]:
        """Add an epoch; returns its line as :meth:`read` gives it."""
        line = {
            "epoch": metrics.epoch,
            "rate": metrics.lr,
            "epsilon": metrics.epsilon,
            "loss": metrics.loss,
            "train_accuracy": metrics.train_accuracy,
            "validation": asdict(metrics.validation),
            "discarded": metrics.discarded,
            "dead": sum(gate.death is not None for gate in metrics.gates),
            "died": list(metrics.died),
            "parameters": {"total": self._parameters, "kept": metrics.parameters},
            "best": metrics.best,
            "seconds": metrics.seconds,
            "images_per_second": metrics.images / metrics.seconds,
            "gates": {
                gate.block: {"steps": gate.steps, "closed": gate.closed_steps, "peak": gate.peak}
                for gate in metrics.gates
                if gate.death is None
            },
        }
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def read(self) -> list[dict[str, Any]]:
        """All epochs so far, including those before a resume."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def _lines_up_to(path: Path, epoch: int) -> list[str]:
    kept = []
    text = path.read_text(encoding="utf-8", errors="replace")  # non-UTF-8 is not JSON either
    for line in text.splitlines(keepends=True):
        try:
            if json.loads(line)["epoch"] <= epoch:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            if line.endswith("\n"):  # only the line being written at a kill may be cut short
                raise FileFormatError(
                    f"{path}: not a metrics log; move it away and resume again"
                ) from None
    return kept


class EpochPrinter(Progress):
    """Prints the epochs of a run: a live display on a terminal, plain lines elsewhere.

    The live display has a bar that moves with every step, the last epoch's line and the block map.
    Epochs in which blocks died are printed on both.

    Args:
        epochs, epochs_done: of the run, and how many of them a resumed run has behind it.
        parameters: of the network with all its blocks.
        position: current position of the run in epochs; 2.5 is in the middle of the third.
        compiles: whether the first epoch includes compilation, so that it says nothing about the
            duration of the others.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        *,
        epochs: int,
        epochs_done: int,
        parameters: int,
        position: Callable[[], float],
        compiles: bool = False,
    ) -> None:
        self._epochs, self._parameters, self._position = epochs, parameters, position
        self._epoch_line = self._map = ""
        self._epsilon: float | None = None
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._compiling_epoch = epochs_done + 1 if compiles else 0
        super().__init__(
            TextColumn(title),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.1f}%"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self.add_task(title, total=epochs)
        console.print(f"{title}: {epochs - epochs_done} epochs to train")

    def show(self, metrics: EpochMetrics) -> None:
        """Print an epoch, or show it in the live display."""
        if metrics.epoch != self._compiling_epoch:
            self._seconds.append(metrics.seconds)
        self._epoch_line = self._line(metrics)
        before, self._map = self._map, block_map(metrics.gates, self.console.width - 2)
        if metrics.died or not self.console.is_terminal:
            self.console.print(self._epoch_line, markup=False)
            if self._map and self._map != before:
                self.console.print(f"  {self._map}", markup=False)
            if metrics.died:
                self.console.print(f"  {_died_line(metrics.died)}", markup=False)

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.task_ids:
            self.update(task, completed=self._position())
        yield from super().get_renderables()
        yield from (text for text in (self._epoch_line, self._map and f"  {self._map}") if text)

    def _line(self, metrics: EpochMetrics) -> str:
        """An epoch in about 80 characters."""
        parts = [
            f"epoch {metrics.epoch:>{len(str(self._epochs))}}/{self._epochs}",
            f"loss {metrics.loss:.3f}",
            f"val {metrics.validation.accuracy:.2%}",
            f"lr {metrics.lr:.3g}",
        ]
        if metrics.gates and metrics.epsilon != self._epsilon:
            parts.append(f"ε {metrics.epsilon:.3g}")
            self._epsilon = metrics.epsilon
        parts.append(f"{metrics.images / metrics.seconds:,.0f} img/s")
        if metrics.parameters != self._parameters:
            parts.append(f"params {metrics.parameters / self._parameters:.0%}")
        if (left := self._epochs - metrics.epoch) and self._seconds:
            parts.append(f"{_clock(left * median(self._seconds))} left")
        return "  ".join(parts)


def _died_line(died: Sequence[str]) -> str:
    """The blocks that died, as many names as fit into a line."""
    named = list(died)
    if cell_len(text := f"died: {', '.join(died)}") <= _NAMES_WIDTH:
        return text
    while len(named) > 1 and cell_len(f"{', '.join(named)} and {len(died)} more") > _NAMES_WIDTH:
        named.pop()
    return f"died: {', '.join(named)} and {len(died) - len(named)} more"


def _clock(seconds: float) -> str:
    """``4:05``, ``3:04:05``, and from two days on ``12 days``."""
    whole = round(seconds)
    if whole >= 48 * 3600:
        return f"{whole / 86400:.0f} days"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
