from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from eps_train.checkpoint import Death, GateRecord
from eps_train.epoch_report import EpochReport
from eps_train.errors import FileFormatError
from eps_train.evaluate import Score
from eps_train.progress import EpochPrinter, MetricsLog, block_map

ALIVE = GateRecord(block="stages.0.0", epsilon=2.5, steps=10, closed_steps=0, peak=9.0)
FLICKERING = replace(ALIVE, block="stages.0.1", closed_steps=4)
CLOSED = replace(ALIVE, block="stages.1.0", closed_steps=10)
DEATH = Death(epoch=3, epsilon=2.5, steps=20, peak=1.0, heldout_peak=1.0, samples=9)
DEAD = replace(ALIVE, block="stages.1.1", closed_steps=10, death=DEATH)


def report(epoch: int, **changes: object) -> EpochReport:
    made = EpochReport(
        epoch=epoch,
        rate=0.1,
        epsilon=2.5,
        loss=1.0,
        train_accuracy=0.5,
        validation=Score(0.75, 0.9, 100),
        discarded=1.4,
        died=(),
        gates=(ALIVE, FLICKERING, CLOSED, DEAD),
        best=True,
        seconds=2.0,
        images=640,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_block_map_shows_each_state_stage_by_stage() -> None:
    assert block_map((ALIVE, FLICKERING, CLOSED, DEAD)) == "█▒ ░·"


def test_a_gate_that_was_not_judged_counts_as_alive() -> None:
    assert block_map((replace(ALIVE, steps=0, closed_steps=0),)) == "█"


def test_metrics_are_appended_and_a_new_run_starts_the_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, epochs_done=0)
    log.append(report(1))
    log.append(report(2))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[0]["images_per_second"] == 320.0
    assert lines[0]["dead"] == 1
    assert lines[0]["gates"]["stages.0.1"] == {"steps": 10, "closed": 4, "peak": 9.0}
    assert "stages.1.1" not in lines[0]["gates"]
    MetricsLog(path, epochs_done=0)
    assert path.read_text() == ""


def test_a_resumed_run_keeps_the_lines_up_to_where_it_resumes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, epochs_done=0)
    for epoch in (1, 2, 3):
        log.append(report(epoch))
    MetricsLog(path, epochs_done=2).append(report(3, loss=9.0))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["epoch"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 9.0)]


def test_a_foreign_file_in_its_place_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("my notes\n")
    with pytest.raises(FileFormatError, match=r"metrics\.jsonl: not a metrics log"):
        MetricsLog(path, epochs_done=2)
    assert path.read_text() == "my notes\n"


def test_plain_output_has_one_line_an_epoch_and_the_map_when_it_changes() -> None:
    stream = io.StringIO()
    with EpochPrinter(Console(file=stream, width=200), "run", epochs=3, epochs_done=0) as printer:
        printer.show(report(1))
        printer.show(report(2))
        printer.show(report(3, died=("stages.1.0",)))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert "epoch 1/3" in lines[1]
    assert lines[1].endswith("█▒ ░·")
    assert "█" not in lines[2]
    assert lines[3].endswith("died: stages.1.0")


def test_what_is_no_text_is_no_metrics_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(FileFormatError, match=r"metrics\.jsonl: not a metrics log"):
        MetricsLog(path, epochs_done=2)
