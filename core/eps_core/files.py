"""Atomic file writes, and a lock on a folder. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from eps_core.errors import ConfigError, naming

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically: temporary file, fsync, read back, rename.

    The temporary file's name is always the same, so that the next write overwrites what a killed
    process has left behind. Missing folders are created.
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
            if os.name == "posix":  # other systems make a rename durable by themselves
                handle = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        finally:
            part.unlink(missing_ok=True)


# The lock of a folder is the kernel's (flock on the folder itself): it leaves no file behind and
# ends with the process, however that ends.


def acquire(folder: Path, busy: str, *, follow: bool = True) -> int | None:
    """Create `folder` if it is missing and lock it, until :func:`release` or the process ends.

    Returns a handle for `release`; None where folders cannot be locked (Windows, some network file
    systems).

    Raises:
        ConfigError: another process holds the lock; its message is `busy`.
        OSError: `folder` is a link and `follow` is false, or as the file system does.
    """
    if fcntl is None:
        folder.mkdir(parents=True, exist_ok=True)
        return None
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | (0 if follow else os.O_NOFOLLOW))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ConfigError(busy) from None
        except OSError:
            os.close(handle)
            return None
        if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
            return handle
        os.close(handle)  # the folder was moved away since it was opened


def release(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


@contextmanager
def held(folder: Path, busy: str) -> Iterator[None]:
    """Hold the lock of `folder` within a `with` block; see :func:`acquire`."""
    with naming(folder):
        handle = acquire(folder, busy)
    try:
        yield
    finally:
        release(handle)
