"""Files that are there whole or not at all. No torch here: servers have none."""

from __future__ import annotations

import os
from pathlib import Path

from eps_train.errors import naming


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step: temporary file, fsync, read back, rename.

    The temporary file's name is always the same, so that what a killed process leaves behind is
    taken up by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with naming(path):
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if part.read_bytes() != content:
                raise OSError(f"{path}: what was read back differs from what was written")
            part.replace(path)
            sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable (POSIX only; other systems do so by themselves)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
