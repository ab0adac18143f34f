from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eps_train.integrations.tensorboard import TensorBoard
from eps_train.training.paths import RunPaths
from eps_train.training.trackers import TrackedRun


def line(epoch: int, peaks: dict[str, float], died: tuple[str, ...] = ()) -> dict[str, Any]:
    """An epoch of a network of three blocks, of whose gates these are live."""
    dead = 3 - len(peaks)
    return {
        "epoch": epoch,
        "rate": 0.1,
        "epsilon": 2.5,
        "loss": 2.0 / epoch,
        "train_accuracy": 0.5,
        "validation": {"accuracy": 0.25 * epoch, "loss": 1.0 / epoch, "samples": 100},
        "discarded": dead + 0.5,
        "dead": dead,
        "died": list(died),
        "parameters": {"total": 300, "kept": 300 - 100 * dead},
        "seconds": 60.0,
        "images_per_second": 640.0,
        "gates": {block: {"steps": 10, "closed": 0, "peak": peak} for block, peak in peaks.items()},
    }


LINES = [
    line(1, {"s.0": 5.0, "s.1": 2.5, "t.0": 25.0}),
    line(2, {"s.0": 5.0, "s.1": 1.0, "t.0": 25.0}, died=("s.1",)),
    line(3, {"s.0": 5.0, "t.0": 50.0}),
    line(4, {"s.0": 5.0, "t.0": 50.0}),
]


@pytest.fixture(autouse=True)
def distinct_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which each event file is written in a second of its own.

    TensorBoard reads event files in the order of their names, which hold the second, the process
    and a count without leading zeros: 10 comes before 9. A run and its resumption, processes that
    import torch, never start in the same second.
    """
    seconds = itertools.count(1_800_000_000)
    clock = SimpleNamespace(time=lambda: float(next(seconds)))
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", clock)


def tracked(files: RunPaths, epochs: int, before: Sequence[dict[str, Any]] = ()) -> TrackedRun:
    return TrackedRun(paths=files, config={}, epochs=epochs, before=before)


def write(files: RunPaths, *, first: int, last: int, epochs: int = 4) -> TensorBoard:
    """The log of a run that goes on after `first` epochs and ends after `last`."""
    log = TensorBoard(tracked(files, epochs, LINES[:first]))
    for done in range(first, last):
        log.add(LINES[done], lambda: LINES[: done + 1])  # noqa: B023
    log.close(finished=True)
    return log


def read(files: RunPaths) -> EventAccumulator:
    kept = {"scalars": 0, "images": 0, "histograms": 0}
    events = EventAccumulator(str(files.tensorboard), kept)
    events.Reload()
    return events


def steps(events: EventAccumulator, tag: str) -> list[int]:
    return [scalar.step for scalar in events.Scalars(tag)]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    files = RunPaths.of(tmp_path)
    write(files, first=0, last=4)
    events = read(files)
    values = {
        tag: [scalar.value for scalar in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert values == {
        "accuracy/training": [0.5] * 4,
        "accuracy/validation": [0.25, 0.5, 0.75, 1.0],
        "loss/training": pytest.approx([2, 1, 2 / 3, 0.5]),
        "loss/validation": pytest.approx([1, 0.5, 1 / 3, 0.25]),
        "run/rate": pytest.approx([0.1] * 4),
        "run/images_per_second": [640.0] * 4,
        "run/seconds": [60.0] * 4,
        "gates/epsilon": [2.5] * 4,
        "blocks/dead": [0, 0, 1, 1],
        "blocks/discarded": [0.5, 0.5, 1.5, 1.5],
        "blocks/parameters_left": pytest.approx([1, 1, 2 / 3, 2 / 3]),
    }
    assert steps(events, "blocks/dead") == [1, 2, 3, 4]


def test_peaks_are_a_histogram_in_units_of_epsilon(tmp_path: Path) -> None:
    files = RunPaths.of(tmp_path)
    write(files, first=0, last=4)
    first, *_, last = (
        event.histogram_value for event in read(files).Histograms("gates/peak_over_epsilon")
    )
    assert (first.num, first.min, first.max) == (3, 1.0, 10.0)
    assert (last.num, last.min, last.max) == (2, 2.0, 20.0)
    assert sum(first.bucket) == 3
    assert len(first.bucket) == len(first.bucket_limit) < 30
    filled = [limit for limit, count in zip(first.bucket_limit, first.bucket, strict=True) if count]
    assert filled == pytest.approx([1.0, 2.0, 10.0], rel=0.13)


def test_images_show_the_map_and_the_peaks(tmp_path: Path) -> None:
    files = RunPaths.of(tmp_path)
    write(files, first=0, last=4, epochs=40)
    events = read(files)
    for tag in ("gates/map", "gates/peaks"):
        shown = events.Images(tag)
        assert [each.step for each in shown] == [2, 4], "20 in all"
        with Image.open(io.BytesIO(shown[0].encoded_image_string)) as image:
            assert image.size == (shown[0].width, shown[0].height)
            colors = image.convert("RGB").getcolors(1 << 20)
        assert colors is not None
        assert len(colors) > 10


@pytest.mark.parametrize("crashed", [1, 2, 4])
def test_a_resumed_run_has_every_epoch_once(tmp_path: Path, crashed: int) -> None:
    """Killed after `crashed` epochs of which the first alone was saved, while writing the next."""
    files = RunPaths.of(tmp_path)
    write(files, first=0, last=crashed)
    (path,) = files.event_files()
    with path.open("ab") as file:
        file.write(b"\x18\0\0\0")  # a record cut short
    write(files, first=1, last=4)
    events = read(files)
    assert steps(events, "loss/training") == [1, 2, 3, 4]
    times = [scalar.wall_time for scalar in events.Scalars("loss/training")]
    assert times == sorted(times)


def test_a_run_resumed_with_it_has_the_epochs_before_too(tmp_path: Path) -> None:
    files = RunPaths.of(tmp_path)
    write(files, first=2, last=4)
    assert steps(read(files), "loss/training") == [1, 2, 3, 4]


def test_other_programs_event_files_stay(tmp_path: Path) -> None:
    files = RunPaths.of(tmp_path)
    other = files.tensorboard / "events.out.tfevents.1700000000.host.42.0"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"")
    write(files, first=0, last=1)
    assert other.exists()
    assert len(files.event_files()) == 1
    assert other not in files.all()


def test_a_baseline_has_no_metrics_of_gates(tmp_path: Path) -> None:
    files = RunPaths.of(tmp_path, "baseline")
    plain = {**line(1, {}), "dead": 0, "epsilon": 0.0}
    log = TensorBoard(tracked(files, 1))
    log.add(plain, lambda: [plain])
    log.close(finished=True)
    tags = read(files).Tags()
    assert not any(tag.startswith(("gates", "blocks/dead")) for tag in tags["scalars"])
    assert tags["images"] == []


def test_open_gates_and_silent_branches_can_be_shown(tmp_path: Path) -> None:
    """Epsilon 0, as before --epsilon-warmup, and branches that start at zero."""
    files = RunPaths.of(tmp_path)
    silent = {**line(1, {"s.0": 0.0, "s.1": 0.0, "t.0": 0.0}), "epsilon": 0.0}
    log = TensorBoard(tracked(files, 1))
    log.add(silent, lambda: [silent])
    log.close(finished=True)
    assert read(files).Tags()["images"] == ["gates/map", "gates/peaks"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is full")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_names_the_folder(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    files = RunPaths.of(tmp_path)
    log = TensorBoard(tracked(files, 4))
    (path,) = files.event_files()
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "full").replace(path)  # at once: SummaryWriter's thread opens it again and again
    with pytest.raises(OSError, match="No space left on device") as raised:
        log.add(LINES[0], lambda: LINES[:1])
    assert raised.value.filename == str(files.tensorboard)
    for thread in set(threading.enumerate()) - before:  # SummaryWriter's: it fails too
        thread.join()
