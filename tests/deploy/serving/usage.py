"""Memory, threads and files of a process (Linux)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Usage:
    """Resident bytes, threads, open files."""

    memory: int
    threads: int
    files: int


def usage(process: int) -> Usage:
    folder = Path("/proc") / str(process)
    lines = (line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    status = {name: value.split()[0] for name, value in lines if value.split()}
    return Usage(
        memory=int(status["VmRSS"]) << 10,
        threads=int(status["Threads"]),
        files=len(list((folder / "fd").iterdir())),
    )
