"""Errors that a user can repair. Libraries raise them; only the command line prints them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class EpsError(Exception):
    """Something in the user's input or surroundings; one line: what, where, remedy."""


class ConfigError(EpsError):
    """Options that contradict each other or cannot be met."""


class DataError(EpsError):
    """A data set that is missing, damaged, or too small for what was asked."""


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
