"""Experiment trackers of a run (`--tracker`): TensorBoard, MLflow, Weights & Biases, or your own.

A tracker is the target of an entry point of the group :data:`GROUP`: a callable that takes a
:class:`TrackedRun` and returns a :class:`Tracker`. It is called in the leading process alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast

from eps_core.cli import Log, missing_package, os_error_line
from eps_core.errors import ConfigError, EpsError
from eps_core.files import replace_file
from eps_train.training.paths import RunPaths
from eps_train.training.plots import Metrics

GROUP = "eps_resnet.trackers"
PROJECT = "eps-resnet"  # W&B's project and MLflow's experiment, unless the environment names one


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A training run, as a tracker sees it.

    Attributes:
        paths: of the run's files. What a tracker writes locally belongs beside them.
        config: the run's configuration, as in `config.json`.
        epochs: number of epochs, those before a resume included.
        before: lines of `metrics.jsonl` that a resumed run has behind it.
        run_id: what the tracker called the run before it was resumed; None for a new run.
    """

    paths: RunPaths
    config: Mapping[str, Any]
    epochs: int
    before: Metrics
    run_id: str | None = None

    @property
    def name(self) -> str:
        """Name of the run for people, such as `outputs/ckpt`."""
        best = self.paths.best
        return f"{best.parent.resolve().name}/{best.stem}"


class Tracker(Protocol):
    """Receives every epoch of a run.

    Attributes:
        run_id: names the run for a later `--resume`; None where the files of the run suffice.
    """

    @property
    def run_id(self) -> str | None: ...

    def add(self, line: Mapping[str, Any], history: Callable[[], Metrics]) -> None:
        """Record an epoch: its line of `metrics.jsonl`; `history` returns all lines so far."""

    def close(self, *, finished: bool) -> None:
        """Called when the run has ended, or with `finished` false when it was stopped."""


Factory = Callable[[TrackedRun], Tracker]


def load(name: str) -> Factory:
    """The tracker that is called `name`. Raises ConfigError without it, or without its package."""
    offered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in offered:
        raise ConfigError(
            f"--tracker {name}: no such tracker; give one of {', '.join(sorted(offered))}, or"
            f" install one that registers the entry point {GROUP}"
        )
    try:
        return cast(Factory, offered[name].load())
    except ModuleNotFoundError as error:
        line = str(error)
        with suppress(ModuleNotFoundError):  # of a package that none of our extras installs
            line = missing_package(error)
        raise ConfigError(f"--tracker {name}: {line}") from error


class Trackers:
    """The trackers of one run; a context manager that closes them.

    A tracker that fails after it has begun is dropped, with a line to `report`: the run goes on.
    Raises ConfigError as :func:`load` does.
    """

    def __init__(self, names: Iterable[str], report: Log) -> None:
        self._factories = {name: load(name) for name in names}
        self._report = report
        self._open: dict[str, Tracker] = {}

    def begin(self, run: TrackedRun) -> None:
        """Begin to track `run`; its `run_id` is read from `run.paths.trackers`, if that exists.

        A tracker that names its runs receives the epochs before a resume, unless it has them.
        Raises EpsError when a tracker cannot begin.
        """
        ids = _read_ids(run.paths.trackers)  # which no new run finds: it would be in the way
        for name, factory in self._factories.items():
            try:
                tracker = self._open[name] = factory(replace(run, run_id=ids.get(name)))
                if tracker.run_id is not None and name not in ids:
                    for line in run.before:
                        tracker.add(line, lambda: run.before)
            except (EpsError, OSError):
                raise
            except Exception as error:  # of any package
                raise ConfigError(f"--tracker {name}: {_first_line(error)}") from error
            if tracker.run_id is not None:
                ids[name] = tracker.run_id
        if ids:
            replace_file(run.paths.trackers, (json.dumps(ids, indent=2) + "\n").encode())

    def add(self, line: Mapping[str, Any], history: Callable[[], Metrics]) -> None:
        self._each(lambda tracker: tracker.add(line, history))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._each(lambda tracker: tracker.close(finished=failure is None))
        self._open.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._open.items()]:
            try:
                call(tracker)
            except Exception as error:  # a service that is down costs no training
                del self._open[name]
                self._report(f"--tracker {name}: {_first_line(error)}; the run goes on without it")


def _read_ids(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); remove it to begin new runs") from None
    return {name: str(run_id) for name, run_id in dict(found).items()}


def _first_line(error: Exception) -> str:
    text = os_error_line(error) if isinstance(error, OSError) else str(error)
    return text.strip().partition("\n")[0] or type(error).__name__


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Scalars of an epoch by tag; `line` is one of `metrics.jsonl`."""
    found = {
        "accuracy/training": line["train_accuracy"],
        "accuracy/validation": line["validation"]["accuracy"],
        "loss/training": line["loss"],
        "loss/validation": line["validation"]["loss"],
        "run/rate": line["rate"],
        "run/images_per_second": line["images_per_second"],
        "run/seconds": line["seconds"],
    }
    if line["gates"] or line["dead"]:
        found["gates/epsilon"] = line["epsilon"]
        found["blocks/dead"] = line["dead"]
        found["blocks/discarded"] = line["discarded"]
    if parameters := line.get("parameters"):
        found["blocks/parameters_left"] = parameters["kept"] / parameters["total"]
    return found
