"""What a run says while it goes: one line an epoch, the block map, and `metrics.jsonl`."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn

from eps_train.atomic import replace_file
from eps_train.checkpoint import GateRecord
from eps_train.epoch_report import EpochReport
from eps_train.errors import FileFormatError, naming
from eps_train.graph import stage_name

LEGEND = "█ alive  ▒ flickering  ░ closed all epoch  · dead"
_OBITUARY = 60  # columns that the names of the blocks that died may take
RECENT = 5  # epochs that the time left is judged by: an epoch gets shorter when blocks leave


def block_map(records: Iterable[GateRecord], width: int | None = None) -> str:
    """The network as a strip of one character a block, a space between stages; see `LEGEND`.

    Where that is more than `width` characters, each stands for several neighbours in a stage, and
    shows the one that is most alive: a stretch is dead when all of it is.
    """
    stages = [
        "".join(map(_symbol, members))
        for _, members in groupby(records, key=lambda record: stage_name(record.block))
    ]
    share = 1
    while width is not None and share < max(map(len, stages), default=0):
        if len(stages) - 1 + sum(-(-len(stage) // share) for stage in stages) <= width:
            break
        share += 1
    return " ".join(_merged(stage, share) for stage in stages)


def _symbol(record: GateRecord) -> str:
    if record.death is not None:
        return "·"
    if not record.closed_steps:
        return "█"
    return "░" if record.closed_steps == record.steps else "▒"


def _merged(stage: str, share: int) -> str:
    pieces = (stage[at : at + share] for at in range(0, len(stage), share))
    return "".join(min(piece, key="█▒░·".index) for piece in pieces)


class MetricsLog:
    """`metrics.jsonl`: one JSON object an epoch, appended and flushed; a resumed run drops the
    epochs that it is about to repeat."""

    def __init__(self, path: Path, *, epochs_done: int, parameters: int) -> None:
        """Open the log of a network that has so many `parameters` with all its blocks."""
        self.path, self._parameters = path, parameters
        kept = _lines_up_to(path, epochs_done) if epochs_done else []
        replace_file(path, "".join(kept).encode())

    def append(self, report: EpochReport) -> dict[str, Any]:
        """Add an epoch; returns its line as :meth:`read` gives it."""
        line = _metrics(report, self._parameters)
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def read(self) -> list[dict[str, Any]]:
        """All epochs so far, those of the run before a resume included."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def _lines_up_to(path: Path, epoch: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    text = path.read_text(encoding="utf-8", errors="replace")  # what is no UTF-8 is no JSON either
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


def _metrics(report: EpochReport, parameters: int) -> dict[str, Any]:
    return {
        "epoch": report.epoch,
        "rate": report.rate,
        "epsilon": report.epsilon,
        "loss": report.loss,
        "train_accuracy": report.train_accuracy,
        "validation": report.validation.to_dict(),
        "discarded": report.discarded,
        "dead": sum(gate.death is not None for gate in report.gates),
        "died": list(report.died),
        "parameters": {"total": parameters, "kept": report.parameters},
        "best": report.best,
        "seconds": report.seconds,
        "images_per_second": report.images / report.seconds,
        "gates": {
            gate.block: {"steps": gate.steps, "closed": gate.closed_steps, "peak": gate.peak}
            for gate in report.gates
            if gate.death is None
        },
    }


class EpochPrinter:
    """A live display on a terminal, plain lines elsewhere; deaths are told on both."""

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
        """Begin to tell of a run.

        Args:
            console: where to.
            title: what is trained.
            epochs, epochs_done: of the run, and how many of them a resumed run has behind it.
            parameters: of the network with all its blocks.
            position: where the run is, in epochs: 2.5 is in the middle of the third.
            compiles: whether the first epoch takes longer than the others, and tells nothing of
                them.
        """
        self._console, self._epochs, self._parameters = console, epochs, parameters
        self._map = ""
        self._epsilon: float | None = None
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._passed_over = epochs_done + 1 if compiles else 0
        self._live = _Live(console, title, epochs, position)
        console.print(f"{title}: {epochs - epochs_done} epochs to train")

    def __enter__(self) -> EpochPrinter:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, report: EpochReport) -> None:
        if report.epoch != self._passed_over:
            self._seconds.append(report.seconds)
        line = self._line(report)
        # To the width of the console, under the line it belongs to.
        shown = block_map(report.gates, self._console.width - 2)
        changed, self._map = shown != self._map, shown
        if report.died or not self._console.is_terminal:
            self._console.print(line, markup=False)
            if shown and changed:
                self._console.print(f"  {shown}", markup=False)
            if report.died:
                self._console.print(f"  {_obituary(report.died)}", markup=False)
        self._live.show(line, shown)

    def _line(self, report: EpochReport) -> str:
        """An epoch in about 80 characters."""
        parts = [
            f"epoch {report.epoch:>{len(str(self._epochs))}}/{self._epochs}",
            f"loss {report.loss:.3f}",
            f"val {report.validation.accuracy:.2%}",
            f"rate {report.rate:g}",
        ]
        if report.gates and report.epsilon != self._epsilon:
            parts.append(f"ε {report.epsilon:.3g}")
            self._epsilon = report.epsilon
        parts.append(f"{report.images / report.seconds:,.0f} img/s")
        if report.parameters != self._parameters:
            parts.append(f"params {report.parameters / self._parameters:.0%}")
        if (left := self._epochs - report.epoch) and self._seconds:
            parts.append(f"{_clock(left * median(self._seconds))} left")
        return "  ".join(parts)


class _Live(Progress):
    """On a terminal: a bar that moves with every step, the last epoch's line, the block map."""

    def __init__(
        self, console: Console, title: str, epochs: int, position: Callable[[], float]
    ) -> None:
        self._position, self._below = position, ("", "")  # read by the very first rendering
        super().__init__(
            TextColumn(title),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.1f}%"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self.add_task(title, total=epochs)

    def show(self, line: str, shown: str) -> None:
        self._below = (line, f"  {shown}" if shown else "")

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.task_ids:
            self.update(task, completed=self._position())
        yield from super().get_renderables()
        yield from (text for text in self._below if text)


def _obituary(died: Sequence[str]) -> str:
    """The blocks that died, as many names as fit into a line."""
    text = f"died: {', '.join(died)}"
    if cell_len(text) <= _OBITUARY:
        return text
    named = list(died)
    while len(named) > 1 and cell_len(f"{', '.join(named)} and {len(died)} more") > _OBITUARY:
        named.pop()
    return f"died: {', '.join(named)} and {len(died) - len(named)} more"


def _clock(seconds: float) -> str:
    """``4:05``, ``3:04:05``, and from two days on ``12 days``."""
    whole = round(seconds)
    if whole >= 48 * 3600:
        return f"{whole / 86400:.0f} days"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
