"""Errors that a user can repair. Libraries raise them; only the command line prints them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class EpsError(Exception):
    """Something in the user's input or surroundings; one line: what, where, remedy."""


class ConfigError(EpsError):
    """Options that contradict each other or cannot be met."""


class DataError(EpsError):
    """A data set that is missing, damaged, or too small for what was asked."""


class DamagedImages(DataError):
    """Images that cannot be used, all of them.

    Attributes:
        problems: by path, one line each that names it.
    """

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
    """Another process of the same run failed, and says itself why; this one ends with it."""


class Interrupted(Exception):
    """The user stopped a command that had something to save, and it has saved it.

    Attributes:
        signal: number of the signal that asked for it.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError from the block name `path`: a full disk does not say which file it was."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def reader_death(error: BaseException) -> str | None:
    """One line for torch's error about a process of its DataLoader that ended; None for others.

    torch raises it from a signal handler, so that it may come up anywhere.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or "DataLoader worker" not in text:
        return None
    first = text.splitlines()[0].partition(", for example")[0].rstrip(". ")
    return (
        f"a process that reads the images has died ({first}); most often memory ran out: give the"
        " container more (--memory, --shm-size 8g), or take a smaller --batch-size or --image-size"
    )
