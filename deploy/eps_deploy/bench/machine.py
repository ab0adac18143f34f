"""What else the machine did during a measurement: its clocks and its other work. Read only.

Nothing here changes a clock, a limit or a mode. A GPU is asked through NVML (the package
nvidia-ml-py, module `pynvml`) where that is installed; everything else is what the operating system
tells. Whatever cannot be read is None, and never a guess.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

# -- What a measurement ran on, as reports say it. Nothing that names the machine itself


def machine() -> dict[str, Any]:
    """Plain data: python, system, processor, cores."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def cpus() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The processor's name; "unknown" where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


# -- What the NVIDIA driver says of itself and its GPUs: no CUDA package, no pycuda, no context

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


# -- One NVIDIA GPU's clocks, temperature and throttling, read through NVML; nothing is changed
#
# NVML is the module `pynvml` of the package nvidia-ml-py. Without it, or without a driver, there
# are no readings.

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
class GpuReading:
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

    def summary(self) -> GpuReading:
        name = self._ask("nvmlDeviceGetName")
        return GpuReading(
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
    address = pci_bus_id(ordinal)
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


__all__ = ["Conditions", "Gpu", "Range", "Watch"]

_PROC = Path("/proc")
_CPUS = Path("/sys/devices/system/cpu")

# A share of all cores that others use, above which a measurement is called noisy; and of stolen
# time, which a virtual machine's host gave to others.
BUSY = 0.10
STOLEN = 0.01
WAITED = 0.02  # of the time, for a free core


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What a measurement went through.

    Attributes:
        seconds: its length.
        cores: of the machine.
        load: average number of running programs over a minute, from the system.
        others: cores that other programs used, on average; None where the system does not tell.
        stolen: cores that the host of a virtual machine gave to others.
        waited: seconds that this process's threads waited for a core, in each second. That does
            not only blur times: a call that is longer than a time slice is almost always
            interrupted, a short one hardly ever, so that ratios come out wrong too.
        cpu_mhz: mean frequency of the cores.
        governor: who chooses that frequency, as Linux names it.
        gpu: None when no GPU was used, or NVML is not to be had.
    """

    seconds: float
    cores: int
    load: Range | None
    others: float | None
    stolen: float | None
    waited: float | None = None
    cpu_mhz: Range | None
    governor: str | None
    gpu: GpuReading | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def starved(self) -> bool:
        """Whether this process had to wait for a core so often that ratios are wrong too."""
        return self.waited is not None and self.waited > WAITED

    def disturbances(self) -> list[str]:
        """What speaks against the measurement, each in words; empty on a quiet machine."""
        found = []
        if self.others is not None and self.others > BUSY * self.cores:
            found.append(f"other programs used {self.others:.1f} of {self.cores} cores")
        if self.stolen is not None and self.stolen > STOLEN * self.cores:
            found.append(f"the host took {self.stolen:.2f} of {self.cores} cores away")
        if self.waited is not None and self.starved:
            found.append(f"this process waited {100 * self.waited:.0f} % of the time for a core")
        if self.gpu is not None:
            found += self.gpu.disturbances()
        return found


class Watch:
    """Reads the clocks when it is told to; a context manager.

    Args:
        gpu: number of the CUDA device that is measured, None for none.
        nvml: the module `pynvml`, for tests; None: import it if it is there.
        proc, cpus: where Linux tells of its work and of its cores, for tests.
    """

    def __init__(
        self, gpu: int | None = None, *, nvml: Any = None, proc: Path = _PROC, cpus: Path = _CPUS
    ) -> None:
        self._proc, self._cpus = proc, cpus
        self._gpu = None if gpu is None else open_gpu(gpu, nvml)
        self._loads: list[float | None] = []
        self._mhz: list[float | None] = []
        self._times: list[tuple[float, float, tuple[float, float] | None]] = []
        self._waits: list[dict[str, float]] = []

    def look(self) -> None:
        """Take a reading: before, between and after the blocks of a measurement."""
        self._times.append((time.perf_counter(), time.process_time(), _work(self._proc)))
        self._waits.append(_waits(self._proc))
        self._loads.append(os.getloadavg()[0] if hasattr(os, "getloadavg") else None)
        self._mhz.append(_mhz(self._cpus))
        if self._gpu is not None:
            self._gpu.look()

    def conditions(self) -> Conditions:
        """What went on from the first look to the last; there must have been one."""
        (began, own, work), (ended, own_after, work_after) = self._times[0], self._times[-1]
        seconds = ended - began
        others = stolen = None
        if work is not None and work_after is not None and seconds > 0:
            # Ticks of 10 ms: a moment's difference may come out a little below zero.
            others = max(0.0, (work_after[0] - work[0] - (own_after - own)) / seconds)
            stolen = max(0.0, (work_after[1] - work[1]) / seconds)
        return Conditions(
            seconds=seconds,
            cores=os.cpu_count() or 1,
            load=span(self._loads),
            others=others,
            stolen=stolen,
            waited=_waited(self._waits[0], self._waits[-1], seconds),
            cpu_mhz=span(self._mhz),
            governor=_text(self._cpus / "cpu0" / "cpufreq" / "scaling_governor"),
            gpu=None if self._gpu is None else self._gpu.summary(),
        )

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._gpu is not None:
            self._gpu.close()


def _work(proc: Path) -> tuple[float, float] | None:
    """Seconds that all cores together have worked, and that were stolen from them, since boot."""
    text = _text(proc / "stat")
    if text is None:
        return None
    ticks = [float(word) for word in text.partition("\n")[0].split()[1:]]
    user, nice, system, _idle, _wait, interrupts, soft, stolen = ticks[:8]
    second = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + interrupts + soft) / second, stolen / second


def _waits(proc: Path) -> dict[str, float]:
    """Seconds that each thread of this process has waited for a core; empty where Linux does not
    count them."""
    found = {}
    for path in proc.glob("self/task/*/schedstat"):
        text = _text(path)  # None: the thread has just ended
        if text is not None:
            found[path.parent.name] = float(text.split()[1]) / 1e9
    return found


def _waited(before: dict[str, float], after: dict[str, float], seconds: float) -> float | None:
    """Of each second, over the threads that are there in the end."""
    if not after or seconds <= 0:
        return None
    return sum(wait - before.get(thread, 0.0) for thread, wait in after.items()) / seconds


def _mhz(cpus: Path) -> float | None:
    """Mean frequency of all cores; None where Linux does not control it, as in most machines of a
    cloud."""
    texts = [_text(path) for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    read = [float(text) / 1000 for text in texts if text is not None]
    return sum(read) / len(read) if read else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
