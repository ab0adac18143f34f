from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from eps_core.errors import FileFormatError
from eps_train.training.checkpoint import GateRecord, PruneRecord
from eps_train.training.evaluate import EpochMetrics, Score
from eps_train.training.progress import EpochPrinter, MetricsLog, block_map

ALIVE = GateRecord(block="stages.0.0", epsilon=2.5, steps=10, closed_steps=0, peak=9.0)
FLICKERING = replace(ALIVE, block="stages.0.1", closed_steps=4)
CLOSED = replace(ALIVE, block="stages.1.0", closed_steps=10)
DEATH = PruneRecord(epoch=3, epsilon=2.5, steps=20, peak=1.0, heldout_peak=1.0, samples=9)
DEAD = replace(ALIVE, block="stages.1.1", closed_steps=10, death=DEATH)


def report(epoch: int, **changes: object) -> EpochMetrics:
    made = EpochMetrics(
        epoch=epoch,
        lr=0.1,
        epsilon=2.5,
        loss=1.0,
        train_accuracy=0.5,
        validation=Score(0.75, 0.9, 100),
        discarded=1.4,
        died=(),
        gates=(ALIVE, FLICKERING, CLOSED, DEAD),
        parameters=600,
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
    log = MetricsLog(path, epochs_done=0, parameters=800)
    log.append(report(1))
    log.append(report(2))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[0]["images_per_second"] == 320.0
    assert lines[0]["dead"] == 1
    assert lines[0]["parameters"] == {"total": 800, "kept": 600}
    assert lines[0]["gates"]["stages.0.1"] == {"steps": 10, "closed": 4, "peak": 9.0}
    assert "stages.1.1" not in lines[0]["gates"]
    MetricsLog(path, epochs_done=0, parameters=800)
    assert path.read_text() == ""


def test_a_resumed_run_keeps_the_lines_up_to_where_it_resumes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, epochs_done=0, parameters=800)
    for epoch in (1, 2, 3):
        log.append(report(epoch))
    MetricsLog(path, epochs_done=2, parameters=800).append(report(3, loss=9.0))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["epoch"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 9.0)]


def test_a_foreign_file_in_its_place_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("my notes\n")
    with pytest.raises(FileFormatError, match=r"metrics\.jsonl: not a metrics log"):
        MetricsLog(path, epochs_done=2, parameters=800)
    assert path.read_text() == "my notes\n"


def printed(width: int, *reports: EpochMetrics, terminal: bool = False) -> list[str]:
    """What a run with these epochs, in all 1200, says on a console of so many columns."""
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=width,
        soft_wrap=not terminal,
        force_terminal=terminal,
        highlight=False,
    )
    place = [0.0]
    with EpochPrinter(
        console, "run", epochs=1200, epochs_done=0, parameters=800, position=lambda: place[0]
    ) as printer:
        for made in reports:
            place[0] = made.epoch
            printer.show(made)
    return stream.getvalue().splitlines()


def test_plain_output_has_one_line_an_epoch_and_the_map_when_it_changes() -> None:
    reports = (
        report(1, parameters=800),
        report(2, parameters=800),
        report(3, died=("stages.1.0",), gates=(ALIVE, FLICKERING, replace(CLOSED, death=DEATH))),
    )
    assert printed(80, *reports) == [
        "run: 1200 epochs to train",
        "epoch    1/1200  loss 1.000  val 75.00%  lr 0.1  ε 2.5  320 img/s  39:58 left",
        "  █▒ ░·",
        "epoch    2/1200  loss 1.000  val 75.00%  lr 0.1  320 img/s  39:56 left",
        "epoch    3/1200  loss 1.000  val 75.00%  lr 0.1  320 img/s  params 75%  39:54 left",
        "  █▒ ·",
        "  died: stages.1.0",
    ]


def test_epsilon_is_told_whenever_it_changes() -> None:
    lines = printed(80, *(report(n, epsilon=e) for n, e in enumerate((0.0, 0.0, 1.25, 1.25), 1)))
    told = [line for line in lines if line.startswith("epoch")]
    assert ["ε 0 " in told[0], "ε" in told[1], "ε 1.25" in told[2], "ε" in told[3]] == [
        True,
        False,
        True,
        False,
    ]


def test_the_time_left_follows_epochs_that_get_shorter() -> None:
    lines = printed(80, *(report(n, seconds=100.0 if n < 8 else 1.0) for n in range(1, 16)))
    assert lines[-1].endswith("19:45 left")  # 1185 epochs of a second


def test_an_epoch_that_compiles_tells_nothing_of_the_time_left() -> None:
    written = io.StringIO()
    with EpochPrinter(
        Console(file=written, width=120),
        "ε-ResNet",
        epochs=3,
        epochs_done=0,
        parameters=1000,
        position=lambda: 0.0,
        compiles=True,
    ) as printer:
        printer.show(report(1, seconds=900.0))
        printer.show(report(2, seconds=2.0))
    first, second = (line for line in written.getvalue().splitlines() if "epoch " in line)
    assert "left" not in first
    assert second.endswith("0:02 left")


def many(blocks: int) -> tuple[GateRecord, ...]:
    return tuple(
        replace(ALIVE, block=f"stages.{stage}.{n}") for stage in range(3) for n in range(blocks)
    )


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_network_of_depth_752_fits_into_a_line(width: int, terminal: bool) -> None:
    names = tuple(f"stages.1.{n}" for n in range(60))
    records = tuple(
        replace(record, death=DEATH) if record.block in names else record for record in many(125)
    )
    lines = printed(width, report(1000, gates=records, died=names), terminal=terminal)
    escapes = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
    shown = [escapes.sub("", part) for line in lines for part in line.split("\r")]
    maps = [line.strip() for line in shown if "█" in line]
    assert maps
    for strip in maps:
        first, second, third = strip.split()
        assert set(first) == set(third) == {"█"}
        assert set(second) == {"·", "█"}, "60 of 125 died"
        assert len(first) == len(second) == len(third) >= 21
    if terminal or width == 120:
        assert max(map(len, shown)) <= width
    assert "  died: stages.1.0, stages.1.1, stages.1.2, stages.1.3 and 56 more" in [
        line.rstrip() for line in shown
    ]


def test_a_terminal_shows_the_last_epoch_under_a_bar() -> None:
    text = "\n".join(printed(100, report(600), terminal=True))
    assert "50.0%" in text
    assert "loss 1.000  val 75.00%" in text
    assert "█▒ ░·" in text


def test_a_shortened_map_shows_the_most_alive_of_each_stretch() -> None:
    gates = (DEAD, DEAD, DEAD, CLOSED, DEAD, FLICKERING, CLOSED, ALIVE)
    stage = [replace(gate, block=f"s.{n}") for n, gate in enumerate(gates)]
    assert block_map(stage) == "···░·▒░█"
    assert block_map(stage, 8) == "···░·▒░█"
    assert block_map(stage, 4) == "·░▒█"
    assert block_map(stage, 3) == "·▒█"
    assert block_map(()) == ""


def test_what_is_no_text_is_no_metrics_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(FileFormatError, match=r"metrics\.jsonl: not a metrics log"):
        MetricsLog(path, epochs_done=2, parameters=800)
