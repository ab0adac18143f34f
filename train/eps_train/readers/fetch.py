"""Fetching a data set's files with torchvision, which knows where they are and checks them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from eps_train.errors import DataError
from eps_train.vision import import_torchvision

T = TypeVar("T")


def fetched(name: str, root: Path, files: str, work: Callable[[], T], *, download: bool) -> T:
    """What `work` returns, a torchvision reader's doing; torchvision can be imported in it.

    Args:
        name: the data set.
        root: where its files belong.
        files: the files, as a message is to name them.
        work: reads them, and fetches them first where that was asked for.
        download: whether it was.

    Raises:
        DataError: says which files to put where.
    """
    import_torchvision()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where --json prints nothing of its own
            return work()
    except Exception as error:  # torchvision raises RuntimeError, OSError, pickle's own and more
        reason = _last_line(error)
    if download:
        raise DataError(
            f"data set {name}: cannot be fetched into {root} ({reason}); put {files} there by hand"
        )
    raise DataError(
        f"data set {name}: not found whole in {root} ({reason}); put {files} there, name its folder"
        " with --data-root, or have eps-train --download fetch them"
    )


def _last_line(error: Exception) -> str:
    """What is wrong; where torchvision tried several mirrors, what the last of them said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # It goes on with an advice to those who call it from Python.
    return lines[-1].partition(" You can use download=True")[0].strip("<>").rstrip(".")
