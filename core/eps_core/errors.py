"""Errors that a user can repair. Libraries raise them; only the command line prints them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class EpsError(Exception):
    """Base class; the message is one line that names the option or file and the repair."""


class ConfigError(EpsError):
    """Options that contradict each other or cannot be met."""


class DataError(EpsError):
    """A data set that is missing, damaged, or too small for what was asked."""


class DamagedImages(DataError):
    """Images that cannot be decoded; `problems` has one line for each, by its path."""

    def __init__(self, message: str, problems: Mapping[str, str]) -> None:
        super().__init__(message)
        self.problems = problems


class FileFormatError(EpsError):
    """A file that is missing, damaged, foreign, or from a newer version of this package."""


class GraphError(EpsError):
    """A network that cannot be traced, or a block name that it does not have."""


class TrainingError(EpsError):
    """A run that must not go on: non-finite numbers, or a network that collapsed."""


class PeerError(EpsError):
    """Another process of the same run failed and reports why; this one ends without a message."""


def one_line(error: BaseException) -> str:
    """The message of an exception in one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class Interrupted(Exception):
    """A command was stopped by the signal of this number, and has saved its state."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Set the filename of an OSError from the `with` block, which a full disk leaves out."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def reader_death(error: BaseException) -> str | None:
    """One line for torch's error about a DataLoader worker that died; None for other errors.

    torch raises it from a signal handler, so it may appear anywhere.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or "DataLoader worker" not in text:
        return None
    first = text.splitlines()[0].partition(", for example")[0].rstrip(". ")
    return (
        f"a process that reads the images has died ({first}); most often memory ran out: give the"
        " container more (--memory, --shm-size 8g), or take a smaller --batch-size or --image-size"
    )
