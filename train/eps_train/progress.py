"""What a run says while it goes: one line an epoch, the block map, and `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eps_train.checkpoint import GateRecord
from eps_train.epoch_report import EpochReport
from eps_train.errors import FileFormatError, naming
from eps_train.graph import stage_name
from eps_train.sealed import replace_file

LEGEND = "█ alive  ▒ flickering  ░ closed all epoch  · dead"


def block_map(records: Iterable[GateRecord]) -> str:
    """The network as a strip of one character a block, a space between stages; see `LEGEND`."""
    stages = groupby(records, key=lambda record: stage_name(record.block))
    return " ".join("".join(map(_symbol, members)) for _, members in stages)


def _symbol(record: GateRecord) -> str:
    if record.death is not None:
        return "·"
    if not record.closed_steps:
        return "█"
    return "░" if record.closed_steps == record.steps else "▒"


class MetricsLog:
    """`metrics.jsonl`: one JSON object an epoch, appended and flushed; a resumed run drops the
    epochs that it is about to repeat."""

    def __init__(self, path: Path, *, epochs_done: int) -> None:
        self.path = path
        kept = _lines_up_to(path, epochs_done) if epochs_done else []
        replace_file(path, "".join(kept).encode())

    def append(self, report: EpochReport) -> None:
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_metrics(report)) + "\n")

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


def _metrics(report: EpochReport) -> dict[str, Any]:
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
    """A progress bar on a terminal, plain lines elsewhere; the block map whenever it changed."""

    def __init__(self, console: Console, title: str, *, epochs: int, epochs_done: int) -> None:
        self._console = console
        self._epochs = epochs
        self._map = ""
        self._progress = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=epochs, completed=epochs_done, news="")
        console.print(f"{title}: {epochs - epochs_done} epochs to train")

    def __enter__(self) -> EpochPrinter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, report: EpochReport) -> None:
        line = (
            f"epoch {report.epoch:>{len(str(self._epochs))}}/{self._epochs}"
            f"  rate {report.rate:g}  loss {report.loss:.3f}"
            f"  validation {report.validation.accuracy:.2%}  {report.seconds:.1f} s"
        )
        shown = block_map(report.gates)
        if shown != self._map:
            line += f"  {shown}"
            self._map = shown
        if report.died:
            line += f"  died: {', '.join(report.died)}"
        if not self._console.is_terminal or report.died:
            self._console.print(line, markup=False)
        self._progress.update(
            self._task,
            completed=report.epoch,
            news=f"validation {report.validation.accuracy:.2%}  {shown}",
        )
