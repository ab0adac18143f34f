"""Free memory of this machine or container: RAM, and shared memory for reader processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SHARED = Path("/dev/shm")  # where processes hand tensors to each other on Linux
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes of RAM that can be taken without swapping: what the machine or its cgroup has left.

    Linux says so itself. Elsewhere it is all the RAM that the machine has.
    """
    machine = _machine()
    if machine is None:
        machine = _installed()
    return min([machine, *_cgroup_rooms()])


def shared() -> int | None:
    """Free bytes of shared memory; None where it has no limit of its own."""
    try:
        found = os.statvfs(SHARED)
    except (AttributeError, OSError):  # no such call, or no such place
        return None
    return found.f_bavail * found.f_frsize


def local_processes() -> int:
    """Processes of this run on this machine, which share its memory (torchrun)."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _machine() -> int | None:
    for line in _lines(_PROC / "meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _installed() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no such call
        return sys.maxsize


def _cgroup_rooms() -> list[int]:
    """What is left below the limit of every cgroup that this process is in, of both versions."""
    rooms = []
    for line in _lines(_PROC / "self" / "cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, limit, usage = _CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit = _CGROUPS / "memory", "memory.limit_in_bytes"
            usage = "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's, while the files lie at the root.
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            room = _room(folder, limit, usage) if folder.is_relative_to(root) else None
            if room is not None:
                rooms.append(room)
    return rooms


def _room(folder: Path, limit: str, usage: str) -> int | None:
    most, used = (_lines(folder / name) for name in (limit, usage))
    if not most or not used or not most[0].strip().isdecimal():  # "max": no limit
        return None
    # The kernel gives back cached files that nobody has looked at lately.
    names = ("inactive_file", "total_inactive_file")
    statistics = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    cached = max([int(statistics[name]) for name in names if name in statistics], default=0)
    return max(0, int(most[0]) - int(used[0]) + cached)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
