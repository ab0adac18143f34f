"""What is free, as Linux tells it in its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from eps_core import machine as system

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """16 GiB free, in no cgroup; the files lie below the folder that this returns."""
    monkeypatch.setattr(system, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(system, "_CGROUPS", tmp_path / "cgroup")
    write(tmp_path / "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {16 << 20} kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_limit_it_is_what_the_machine_has_left(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/user\n")
    write(machine / "cgroup/user/memory.max", "max\n")
    write(machine / "cgroup/user/memory.current", "5\n")
    assert system.available_memory() == 16 * GIB


@pytest.mark.parametrize("folder", ["cgroup", "cgroup/pod", "cgroup/pod/box"])
def test_the_limit_of_a_cgroup_or_of_one_above_counts(folder: str, machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/pod/box\n")
    write(machine / folder / "memory.max", f"{4 * GIB}\n")
    write(machine / folder / "memory.current", f"{3 * GIB}\n")
    assert system.available_memory() == GIB
    write(machine / folder / "memory.stat", f"anon 7\ninactive_file {GIB}\n")
    assert system.available_memory() == 2 * GIB, "files that are only cached are given back"


def test_the_first_version_of_cgroups_counts_too(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "4:cpu:/x\n3:memory:/docker/1\n")
    write(machine / "cgroup/memory/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(machine / "cgroup/memory/memory.usage_in_bytes", f"{GIB}\n")
    assert system.available_memory() == GIB


def test_shared_memory_that_is_not_there_has_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "SHARED", tmp_path)
    assert system.shared_memory() is not None
    monkeypatch.setattr(system, "SHARED", tmp_path / "none")
    assert system.shared_memory() is None
