"""The machine: processor, memory, NVIDIA driver and GPUs; clocks and load during a measurement.

Read only: nothing here changes a clock, a limit or a mode. GPU clocks come from NVML (module
`pynvml` of the package nvidia-ml-py) where it is installed, everything else from the operating
system and nvidia-smi; no CUDA package is needed. Whatever cannot be read is None.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

_PROC = Path("/proc")

# -- Processor


def machine() -> dict[str, Any]:
    """Plain data for reports: python, system, processor, cores. Nothing that names the machine."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def cpus() -> int:
    """Number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Name of the processor, or "unknown"."""
    found = re.search(r"^model name\s*:(.*)", _text(_PROC / "cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or "unknown"


# -- Free memory of this machine or container: RAM, and shared memory between processes

SHARED = Path("/dev/shm")  # where processes hand tensors to each other on Linux
_CGROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes of RAM that can be used without swapping, within the limits of this process's cgroups.

    Where the system does not say (not Linux), all the RAM that the machine has.
    """
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text(_PROC / "meminfo"), re.MULTILINE)
    if found:
        free = int(found[1]) * 1024
    else:
        try:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # Windows has no such call
            free = sys.maxsize
    return min([free, *_cgroup_rooms()])


def shared_memory() -> int | None:
    """Free bytes of shared memory; None where it has no limit of its own."""
    try:
        found = os.statvfs(SHARED)
    except (AttributeError, OSError):  # no such call, or no such folder
        return None
    return found.f_bavail * found.f_frsize


def _cgroup_rooms() -> Iterator[int]:
    """Bytes left below the limit of each cgroup of this process, of both cgroup versions."""
    for line in _text(_PROC / "self" / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, limit, usage = _CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit = _CGROUPS / "memory", "memory.limit_in_bytes"
            usage = "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's, while the files are at the root.
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(root):
                break
            most, used = _text(folder / limit), _text(folder / usage)
            if most.isdecimal() and used:  # "max": no limit
                # The kernel reclaims cached files that have not been read lately.
                pattern = r"^(?:total_)?inactive_file (\d+)$"
                cached = re.findall(pattern, _text(folder / "memory.stat"), re.MULTILINE)
                yield max(0, int(most) - int(used) + max(map(int, cached), default=0))


# -- NVIDIA driver and GPUs, without a CUDA context

CUDA_13_DRIVER = 580  # oldest driver for CUDA 13
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_FIELDS = ("index", "name", "compute_cap", "memory.total", "memory.free", "driver_version")
_SECONDS = 30.0  # a driver that was just loaded is slow to answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU as nvidia-smi lists it.

    Memory is in MiB; None for a GPU without memory of its own, such as GB10 and Jetson.
    """

    index: int  # as nvidia-smi counts, regardless of CUDA_VISIBLE_DEVICES
    name: str  # `NVIDIA H100 80GB HBM3`
    compute_capability: str  # `9.0`
    memory: int | None
    free: int | None
    driver: str  # `580.65.06`


def is_too_old(driver: str) -> bool:
    """Whether a driver (`570.86.15`) is too old for CUDA 13, which pip installs by default."""
    major = driver.partition(".")[0]
    return major.isdecimal() and int(major) < CUDA_13_DRIVER


def gpus() -> tuple[Gpu, ...]:
    """GPUs that nvidia-smi lists; none where it is missing or fails."""
    query = f"--query-gpu={','.join(_FIELDS)}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(gpu for line in done.stdout.splitlines() if (gpu := _parse_gpu(line)) is not None)


def _parse_gpu(line: str) -> Gpu | None:
    """Parse one line of nvidia-smi; None if it is incomplete, as of a GPU that fell off the bus."""
    try:
        index, name, capability, *sizes, driver = (part.strip() for part in line.split(","))
        memory, free = (
            None if text in ("[N/A]", "[Not Supported]") else int(text) for text in sizes
        )
        if re.fullmatch(r"\d+\.\d+", capability) is None:
            return None
        return Gpu(
            index=int(index),
            name=name,
            compute_capability=capability,
            memory=memory,
            free=free,
            driver=driver,
        )
    except ValueError:
        return None


def driver_version() -> str | None:
    """Version of the display driver, as `580.65.06`; None without one."""
    text = _text(_KERNEL_MODULE)
    if not text:  # WSL uses the driver of Windows and has no kernel module
        return next((gpu.driver for gpu in gpus()), None)
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)*\b", text)
    return found.group() if found else None


def pci_bus_id(ordinal: int) -> str | None:
    """PCI address, as `0000:65:00.0`, of the GPU that CUDA calls `ordinal`; None without CUDA.

    CUDA counts the fastest GPU first, and only those in CUDA_VISIBLE_DEVICES; nvidia-smi and NVML
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


# -- GPU clocks, temperature and throttling, read through NVML

# Bits of nvmlClocksEventReasons (nvml.h); idleness and clocks set by a user are no throttling.
_THROTTLES = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """First and last reading, and the lowest and highest (for clocks, under load)."""

    before: float
    after: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReading:
    """NVML readings of one GPU over a measurement."""

    name: str
    sm_mhz: Range | None
    memory_mhz: Range | None
    celsius: Range | None
    watts: Range | None
    highest_sm_mhz: float | None  # maximum clock of its processors
    throttled: tuple[str, ...]  # reasons for which the clocks were reduced, at any time
    others: int | None  # other programs that computed on it


class _GpuMonitor:
    """Polls one GPU through NVML. Laptop GPUs and MIG slices refuse some readings."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._readings: dict[str, list[float | None]] = defaultdict(list)
        self._reasons = 0
        self._others: int | None = None
        self.close = nvml.nvmlShutdown

    def poll(self) -> None:
        nvml, readings = self._nvml, self._readings
        readings["sm_mhz"].append(self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM))
        readings["memory_mhz"].append(self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM))
        celsius = self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)
        readings["celsius"].append(celsius)
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        readings["watts"].append(None if milliwatts is None else milliwatts / 1000)
        # NVML 12 renamed this function; older ones have the second name only.
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        self._reasons |= reasons or 0
        running = self._ask("nvmlDeviceGetComputeRunningProcesses")
        if running is not None:
            # One of them is this process, under another pid if it runs in a container.
            self._others = max(len(running) - 1, self._others or 0)

    def summary(self) -> GpuReading:
        name, readings = self._ask("nvmlDeviceGetName"), self._readings
        return GpuReading(
            name=name.decode() if isinstance(name, bytes) else str(name),  # bytes before NVML 12
            sm_mhz=_span(readings["sm_mhz"], at_work=True),
            memory_mhz=_span(readings["memory_mhz"], at_work=True),
            celsius=_span(readings["celsius"]),
            watts=_span(readings["watts"]),
            highest_sm_mhz=self._ask("nvmlDeviceGetMaxClockInfo", self._nvml.NVML_CLOCK_SM),
            throttled=tuple(text for bit, text in _THROTTLES.items() if self._reasons & bit),
            others=self._others,
        )

    def _ask(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except (AttributeError, self._nvml.NVMLError):
            return None


def _open_gpu(ordinal: int) -> _GpuMonitor | None:
    """Monitor the GPU that CUDA calls `ordinal`; None without NVML or its driver."""
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        if (address := pci_bus_id(ordinal)) is not None:
            return _GpuMonitor(nvml, nvml.nvmlDeviceGetHandleByPciBusId(address))
        # Without its address, assume that CUDA and NVML count alike.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        name = visible.split(",")[ordinal].strip() if visible else str(ordinal)
        if name.isdecimal():
            return _GpuMonitor(nvml, nvml.nvmlDeviceGetHandleByIndex(int(name)))
        return _GpuMonitor(nvml, nvml.nvmlDeviceGetHandleByUUID(name))
    except (nvml.NVMLError, IndexError):
        nvml.nvmlShutdown()
        return None


def _span(readings: list[float | None], *, at_work: bool = False) -> Range | None:
    """Summarise readings; None without any. `at_work`: the first, of an idle GPU, is no extreme."""
    read = [float(value) for value in readings if value is not None]
    if not read:
        return None
    counted = read[1:] if at_work and len(read) > 1 else read
    return Range(before=read[0], after=read[-1], low=min(counted), high=max(counted))


# -- Conditions of a measurement

_CPUS = Path("/sys/devices/system/cpu")

# Above these a measurement is noisy.
CLOCK_MOVED = 0.02  # of the lowest to the highest GPU clock: one step is under 1 %
BUSY = 0.10  # of all cores, used by other programs
STOLEN = 0.01  # of all cores, given to others by the host of a virtual machine
WAITED = 0.02  # of the time, for a free core


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What else the machine did during a measurement.

    Attributes:
        seconds: length of the measurement.
        load: load average over a minute.
        others: cores that other programs used, on average; None if unknown.
        stolen: cores that the host of a virtual machine gave to others.
        waited: seconds that this process's threads waited for a core, in each second. This makes
            ratios wrong too: a call longer than a time slice is almost always interrupted, a short
            one hardly ever.
        cpu_mhz: mean frequency of the cores.
        governor: of that frequency, as Linux names it.
        gpu: None when no GPU was used, or NVML is unavailable.
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

    @property
    def starved(self) -> bool:
        """Whether this process waited for a core so often that ratios are wrong too."""
        return self.waited is not None and self.waited > WAITED

    def disturbances(self) -> list[str]:
        """Reasons to distrust the measurement; empty on a quiet machine."""
        found = []
        if self.others is not None and self.others > BUSY * self.cores:
            found.append(f"other programs used {self.others:.1f} of {self.cores} cores")
        if self.stolen is not None and self.stolen > STOLEN * self.cores:
            found.append(f"the host took {self.stolen:.2f} of {self.cores} cores away")
        if self.starved and self.waited:
            found.append(f"this process waited {100 * self.waited:.0f} % of the time for a core")
        gpu = self.gpu
        if gpu is None:
            return found
        if gpu.throttled:
            found.append(f"the GPU was throttled ({', '.join(gpu.throttled)})")
        clock = gpu.sm_mhz
        if clock is not None and clock.low < (1 - CLOCK_MOVED) * clock.high:
            found.append(f"the GPU's clock moved from {clock.low:.0f} to {clock.high:.0f} MHz")
        if gpu.others:
            programs = "program" if gpu.others == 1 else "programs"
            found.append(f"{gpu.others} other {programs} computed on the GPU")
        return found


class MachineMonitor:
    """Reads clocks and load whenever it is polled; a context manager.

    `gpu` is the number of the CUDA device that is measured, None for none.
    """

    def __init__(self, gpu: int | None = None) -> None:
        self._gpu = None if gpu is None else _open_gpu(gpu)
        self._loads: list[float | None] = []
        self._mhz: list[float | None] = []
        # Of each poll: wall and own time; work and stolen time; the threads' waits for a core
        self._times: list[tuple[float, float, tuple[float, float] | None, dict[str, float]]] = []

    def poll(self) -> None:
        """Take a reading: before, between and after the blocks of a measurement."""
        now, own = time.perf_counter(), time.process_time()
        self._times.append((now, own, _work(), _waits()))
        self._loads.append(os.getloadavg()[0] if hasattr(os, "getloadavg") else None)
        self._mhz.append(_mhz())
        if self._gpu is not None:
            self._gpu.poll()

    def conditions(self) -> Conditions:
        """Summarise the readings; :meth:`poll` must have been called."""
        began, own_before, work_before, waits_before = self._times[0]
        ended, own, work, waits = self._times[-1]
        seconds = ended - began
        others = stolen = waited = None
        if work_before is not None and work is not None and seconds > 0:
            # In ticks of 10 ms a short difference may be slightly negative.
            others = max(0.0, (work[0] - work_before[0] - (own - own_before)) / seconds)
            stolen = max(0.0, (work[1] - work_before[1]) / seconds)
        if waits and seconds > 0:  # over the threads that exist at the end
            total = sum(wait - waits_before.get(thread, 0.0) for thread, wait in waits.items())
            waited = total / seconds
        return Conditions(
            seconds=seconds,
            cores=os.cpu_count() or 1,
            load=_span(self._loads),
            others=others,
            stolen=stolen,
            waited=waited,
            cpu_mhz=_span(self._mhz),
            governor=_text(_CPUS / "cpu0" / "cpufreq" / "scaling_governor") or None,
            gpu=None if self._gpu is None else self._gpu.summary(),
        )

    def __enter__(self) -> MachineMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        if self._gpu is not None:
            self._gpu.close()


def _work() -> tuple[float, float] | None:
    """Seconds of work and of stolen time since boot, over all cores."""
    text = _text(_PROC / "stat")
    if not text:
        return None
    ticks = [float(word) for word in text.partition("\n")[0].split()[1:]]
    user, nice, system, _idle, _wait, interrupts, soft, stolen = ticks[:8]
    second = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + interrupts + soft) / second, stolen / second


def _waits() -> dict[str, float]:
    """Seconds that each thread of this process has waited for a core; empty if unknown."""
    found = {path.parent.name: _text(path) for path in _PROC.glob("self/task/*/schedstat")}
    # Empty: the thread has just ended.
    return {thread: float(text.split()[1]) / 1e9 for thread, text in found.items() if text}


def _mhz() -> float | None:
    """Mean frequency of all cores; None where Linux does not control it, as on most clouds."""
    texts = map(_text, _CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    read = [float(text) / 1000 for text in texts if text]
    return sum(read) / len(read) if read else None


def _text(path: Path) -> str:
    """Contents of a file of the system; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
