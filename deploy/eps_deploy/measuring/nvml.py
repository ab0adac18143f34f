"""One NVIDIA GPU's clocks, temperature and throttling, read through NVML; nothing is changed.

NVML is the module `pynvml` of the package nvidia-ml-py. Without it, or without a driver, there are
no readings.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from eps_deploy import nvidia

CLOCK_MOVED = 0.02  # of the lowest to the highest GPU clock: one step of them is under 1 %

# Bits of nvmlClocksEventReasons (nvml.h); idleness and clocks that somebody set are no throttling.
_THROTTLES = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """First and last reading, and the lowest and highest of all (of clocks, under load)."""

    before: float
    after: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """What NVML told of one GPU.

    Attributes:
        name: as NVML has it.
        sm_mhz, memory_mhz, celsius, watts: over the measurement.
        highest_sm_mhz: what its processors can reach.
        throttled: reasons for which the clocks were held down, at any time.
        others: programs besides this one that computed on it.
    """

    name: str
    sm_mhz: Range | None
    memory_mhz: Range | None
    celsius: Range | None
    watts: Range | None
    highest_sm_mhz: float | None
    throttled: tuple[str, ...]
    others: int | None

    def disturbances(self) -> list[str]:
        """What speaks against a measurement on it, each in words."""
        found = []
        if self.throttled:
            found.append(f"the GPU was throttled ({', '.join(self.throttled)})")
        clock = self.sm_mhz
        if clock is not None and clock.low < (1 - CLOCK_MOVED) * clock.high:
            found.append(f"the GPU's clock moved from {clock.low:.0f} to {clock.high:.0f} MHz")
        if self.others:
            programs = "program" if self.others == 1 else "programs"
            found.append(f"{self.others} other {programs} computed on the GPU")
        return found


class GpuWatch:
    """One GPU through NVML. Each reading may be refused, by a laptop's GPU or a slice of one."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._readings: dict[str, list[float | None]] = {}
        self._reasons = 0
        self._others: int | None = None

    def look(self) -> None:
        nvml = self._nvml
        readings = {
            "sm_mhz": self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            "memory_mhz": self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "celsius": self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "watts": self._ask("nvmlDeviceGetPowerUsage"),
        }
        if readings["watts"] is not None:
            readings["watts"] /= 1000
        for name, value in readings.items():
            self._readings.setdefault(name, []).append(value)
        # The younger name first: NVML 12 renamed it.
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        self._reasons |= reasons or 0
        running = self._ask("nvmlDeviceGetComputeRunningProcesses")
        if running is not None:
            # One of them is this one, under a number of its own if it runs in a container.
            self._others = max(len(running) - 1, self._others or 0)

    def summary(self) -> Gpu:
        name = self._ask("nvmlDeviceGetName")
        return Gpu(
            name=name.decode() if isinstance(name, bytes) else str(name),  # bytes before NVML 12
            sm_mhz=span(self._readings.get("sm_mhz", []), at_work=True),
            memory_mhz=span(self._readings.get("memory_mhz", []), at_work=True),
            celsius=span(self._readings.get("celsius", [])),
            watts=span(self._readings.get("watts", [])),
            highest_sm_mhz=self._ask("nvmlDeviceGetMaxClockInfo", self._nvml.NVML_CLOCK_SM),
            throttled=tuple(text for bit, text in _THROTTLES.items() if self._reasons & bit),
            others=self._others,
        )

    def _ask(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except (AttributeError, self._nvml.NVMLError):
            return None

    def close(self) -> None:
        self._nvml.nvmlShutdown()


def open_gpu(ordinal: int, nvml: Any) -> GpuWatch | None:
    """The GPU that CUDA calls `ordinal`; None without NVML or its driver."""
    if nvml is None:
        try:
            nvml = import_module("pynvml")
        except ImportError:
            return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        return GpuWatch(nvml, _handle(ordinal, nvml))
    except (nvml.NVMLError, IndexError):
        nvml.nvmlShutdown()
        return None


def _handle(ordinal: int, nvml: Any) -> Any:
    """By its address where CUDA tells it; else by its number, as if both counted alike."""
    address = nvidia.pci_bus_id(ordinal)
    if address is not None:
        return nvml.nvmlDeviceGetHandleByPciBusId(address)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    name = visible.split(",")[ordinal].strip() if visible else str(ordinal)
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)


def span(readings: list[float | None], *, at_work: bool = False) -> Range | None:
    """None without a reading. `at_work`: the first one, of an idle GPU, is no low or high."""
    read = [float(value) for value in readings if value is not None]
    if not read:
        return None
    counted = read[1:] if at_work and len(read) > 1 else read
    return Range(before=read[0], after=read[-1], low=min(counted), high=max(counted))
