"""What the NVIDIA driver says of itself and its GPUs: no CUDA, no pycuda, no context."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

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
        memory, free: MiB.
        driver: `580.65.06`.
    """

    index: int
    name: str
    compute_capability: str
    memory: int
    free: int
    driver: str


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


def _parse(line: str) -> Gpu | None:
    """A GPU from one line; None for a line that is none, as of a GPU that fell off the bus."""
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(_FIELDS):
        return None
    index, name, capability, memory, free, driver = parts
    try:
        return Gpu(
            index=int(index),
            name=name,
            compute_capability=capability,
            memory=int(memory),
            free=int(free),
            driver=driver,
        )
    except ValueError:
        return None
