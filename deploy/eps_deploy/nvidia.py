"""What the NVIDIA driver says of itself and its GPUs: no CUDA package, no pycuda, no context."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CUDA_13_DRIVER = 580  # the first that runs it
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_FIELDS = ("index", "name", "compute_cap", "memory.total", "memory.free", "driver_version")
_SECONDS = 30.0  # a driver that was just loaded takes some to answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One line of nvidia-smi.

    Attributes:
        index: as nvidia-smi counts, which knows nothing of CUDA_VISIBLE_DEVICES.
        name: `NVIDIA H100 80GB HBM3`.
        compute_capability: `9.0`.
        memory, free: MiB; None where it has none of its own, as GB10 and Jetson.
        driver: `580.65.06`.
    """

    index: int
    name: str
    compute_capability: str
    memory: int | None
    free: int | None
    driver: str


def is_too_old(driver: str) -> bool:
    """Whether a driver (`570.86.15`) is older than CUDA 13 needs, which pip installs by default."""
    major = driver.partition(".")[0]
    return major.isdecimal() and int(major) < CUDA_13_DRIVER


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists; none where it is missing or sees none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    command = [tool, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if done.returncode:
        return ()
    return tuple(gpu for line in done.stdout.splitlines() if (gpu := _parse(line)) is not None)


def driver_version() -> str | None:
    """The display driver's version, as `580.65.06`; None where there is none to be seen."""
    try:
        text = _KERNEL_MODULE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        # Under WSL the driver is that of Windows, and there is no kernel module.
        return next((gpu.driver for gpu in gpus()), None)
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)*\b", text)
    return found.group() if found else None


def pci_bus_id(ordinal: int) -> str | None:
    """Where the GPU that CUDA calls `ordinal` is, as `0000:65:00.0`; None where CUDA cannot tell.

    CUDA counts the fastest first, and only what CUDA_VISIBLE_DEVICES leaves it; nvidia-smi and NVML
    count all of them by this address.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        or cuda.cuDeviceGetPCIBusId(text, len(text), device)
    )
    return None if failed else text.value.decode()


def _parse(line: str) -> Gpu | None:
    """A GPU from one line; None for a line that is none, as of a GPU that fell off the bus."""
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(_FIELDS):
        return None
    index, name, capability, memory, free, driver = parts
    if re.fullmatch(r"\d+\.\d+", capability) is None:
        return None
    try:
        return Gpu(
            index=int(index),
            name=name,
            compute_capability=capability,
            memory=_mebibytes(memory),
            free=_mebibytes(free),
            driver=driver,
        )
    except ValueError:
        return None


def _mebibytes(text: str) -> int | None:
    return None if text in ("[N/A]", "[Not Supported]") else int(text)
