"""What else the machine did during a measurement: its clocks and its other work. Read only.

Nothing here changes a clock, a limit or a mode. A GPU is asked through NVML (the package
nvidia-ml-py, module `pynvml`) where that is installed; everything else is what the operating system
tells. Whatever cannot be read is None, and never a guess.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eps_deploy.measuring.nvml import Gpu, Range, open_gpu, span

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
    gpu: Gpu | None

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
