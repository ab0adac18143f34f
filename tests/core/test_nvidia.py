"""GPUs and driver from nvidia-smi, the kernel module and libcuda."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from eps_core import machine
from eps_core.machine import Gpu, driver_version, gpus

H100 = "0, NVIDIA H100 80GB HBM3, 9.0, 81559, 81046, 580.95.05"
KERNEL = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build"
    "  (dvs-builder@U22-I3-AE18)  Tue Sep 23 09:58:21 UTC 2025\n"
    "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04.2)\n"
)


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str, status: int = 0) -> None:
    """A nvidia-smi that prints these lines, and nothing else on the PATH."""
    tool = folder / "nvidia-smi"
    told = "\n".join(f"echo '{line}'" for line in lines)
    tool.write_text(f"#!/bin/sh\n{told}\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = "1, NVIDIA A2, 8.6, 15356, 100, 580.95.05"
    nvidia_smi(tmp_path, monkeypatch, H100, second)
    found = gpus()
    assert [gpu.index for gpu in found] == [0, 1]
    assert found[0] == Gpu(
        index=0,
        name="NVIDIA H100 80GB HBM3",
        compute_capability="9.0",
        memory=81559,
        free=81046,
        driver="580.95.05",
    )


@pytest.mark.parametrize("unknown", ["[N/A]", "[Not Supported]"])
def test_a_gpu_that_shares_the_processor_s_memory(
    unknown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, f"0, NVIDIA GB10, 12.1, {unknown}, {unknown}, 580.95.05")
    (found,) = gpus()
    assert (found.name, found.memory, found.free) == ("NVIDIA GB10", None, None)


class Libcuda:
    """The driver's library, for two GPUs, the second of which CUDA puts first."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0 if ordinal < 2 else 101

    def cuDeviceGetPCIBusId(self, text: Any, size: int, device: Any) -> int:
        text.value = (b"0000:65:00.0", b"0000:17:00.0")[device.value]
        return 0 if size >= 13 else 1


def test_pci_bus_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": Libcuda()}[name])
    assert [machine.pci_bus_id(n) for n in range(3)] == ["0000:65:00.0", "0000:17:00.0", None]


def test_pci_bus_id_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert machine.pci_bus_id(0) is None


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ((), 0),
        (("No devices were found",), 6),
        (("0, NVIDIA H100, [N/A], [GPU is lost], [GPU is lost], 580.95.05",), 0),
        (("0, NVIDIA H100, 9.0, [GPU is lost], [GPU is lost], 580.95.05",), 0),
        (("0, NVIDIA H100, [N/A], [N/A], [N/A], 580.95.05",), 0),
        ((H100,), 9),
    ],
)
def test_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: tuple[str, ...], status: int
) -> None:
    nvidia_smi(tmp_path, monkeypatch, *lines, status=status)
    assert gpus() == ()


def test_no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == ()


def test_driver_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the kernel module; under WSL, which has none, from nvidia-smi; else there is none."""
    module = tmp_path / "version"
    monkeypatch.setattr(machine, "_KERNEL_MODULE", module)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version() is None
    nvidia_smi(tmp_path, monkeypatch, H100.replace("580.95.05", "591.44"))
    assert driver_version() == "591.44"
    module.write_text(KERNEL)
    assert driver_version() == "580.95.05"
