"""Conditions of a measurement, from fake files of Linux and a fake NVML."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from eps_core import machine
from eps_core.machine import Conditions, MachineMonitor, Range


class FakeNvml:
    """The functions of nvidia-ml-py that are used, for one GPU that heats up."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.open = 0
        self.asked: list[object] = []
        self.sm = [345, 1980, 1755]
        self.reasons = [0x1, 0x4 | 0x20, 0x1]

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.asked.append(index)
        if index > 3:
            raise self.NVMLError
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetHandleByPciBusId(self, address: str) -> str:
        self.asked.append(address)
        return "handle"

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA H100"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return self.sm.pop(0) if kind == self.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return 1980

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        raise self.NVMLError  # as on many a laptop

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.reasons.pop(0)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=4711), SimpleNamespace(pid=4712)]  # of the host


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA knows no PCI addresses, whatever this machine has."""
    monkeypatch.setattr(machine, "pci_bus_id", lambda ordinal: None)


def monitored(nvml: Any, gpu: int = 0) -> Conditions:
    with patch.dict(sys.modules, pynvml=nvml), MachineMonitor(gpu) as monitor:
        for _ in range(3):
            monitor.poll()
        return monitor.conditions()


def test_a_gpu_is_only_read() -> None:
    """The fake has no function that sets anything: to call one would be an error."""
    nvml = FakeNvml()
    gpu = monitored(nvml).gpu
    assert gpu is not None
    assert gpu.name == "NVIDIA H100"
    assert gpu.sm_mhz == Range(before=345, after=1755, low=1755, high=1980)
    assert (gpu.highest_sm_mhz, gpu.watts, gpu.others) == (1980, None, 1)
    assert gpu.throttled == ("software power cap", "software thermal slowdown")
    assert nvml.open == 0


def test_throttling_between_the_blocks_is_reported_though_the_gpu_idles_before_and_after() -> None:
    found = " ".join(monitored(FakeNvml()).disturbances())
    assert "throttled (software power cap, software thermal slowdown)" in found
    assert "moved from 1755 to 1980 MHz" in found
    assert "1 other program computed on the GPU" in found


def test_an_older_nvml_has_another_name_for_the_reasons() -> None:
    class Older(FakeNvml):
        def __getattribute__(self, name: str) -> Any:
            if name == "nvmlDeviceGetCurrentClocksEventReasons":
                raise AttributeError(name)
            return super().__getattribute__(name)

        def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
            return 0x40

    gpu = monitored(Older()).gpu
    assert gpu is not None
    assert gpu.throttled == ("hardware thermal slowdown",)


def test_the_gpu_that_is_monitored_is_the_one_that_cuda_runs_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA counts the fastest GPU first, NVML by address: the same number may be another GPU."""
    monkeypatch.setattr(machine, "pci_bus_id", ["0000:65:00.0", "0000:17:00.0"].__getitem__)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    nvml = FakeNvml()
    assert monitored(nvml, 1).gpu is not None
    assert nvml.asked == ["0000:17:00.0"]


@pytest.mark.parametrize(
    ("visible", "ordinal", "asked"),
    [(None, 0, 0), ("", 1, 1), ("2,3", 1, 3), ("GPU-8f0a, GPU-11bc", 1, "GPU-11bc")],
)
def test_cuda_and_nvml_number_gpus_differently(
    visible: str | None, ordinal: int, asked: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNvml()
    monitored(nvml, ordinal)
    assert nvml.asked == [asked]


def test_no_driver_or_no_such_gpu_leaves_the_gpu_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driverless(FakeNvml):
        def nvmlInit(self) -> None:
            raise self.NVMLError

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert monitored(Driverless()).gpu is None
    nvml = FakeNvml()
    assert monitored(nvml, 7).gpu is None
    assert nvml.open == 0


@pytest.fixture
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the system reports load and cores, empty at first."""
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    return tmp_path


def write_stat(proc: Path, *, user: int, stolen: int) -> None:
    (proc / "stat").write_text(f"cpu  {user} 0 0 500 20 0 0 {stolen} 0 0\ncpu0 1 2 3\n")


def test_the_work_of_others_and_stolen_time_on_linux(
    linux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 10 s all cores worked 13 s, 9 of them for this process; 0.5 s were stolen."""
    ticks = os.sysconf("SC_CLK_TCK")
    moments = iter([(0.0, 5.0), (10.0, 14.0)])
    now = [0.0, 0.0]
    monkeypatch.setattr("eps_core.machine.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("eps_core.machine.time.process_time", lambda: now[1])
    monkeypatch.setattr("eps_core.machine.os.cpu_count", lambda: 2)
    monitor = MachineMonitor()
    for user, stolen in ((100 * ticks, 7 * ticks), (113 * ticks, 7 * ticks + ticks // 2)):
        now[:] = next(moments)
        write_stat(linux, user=user, stolen=stolen)
        monitor.poll()
    found = monitor.conditions()
    assert (found.seconds, found.cores) == (10, 2)
    assert found.others == pytest.approx(0.4)
    assert found.stolen == pytest.approx(0.05)
    assert found.disturbances() == [
        "other programs used 0.4 of 2 cores",
        "the host took 0.05 of 2 cores away",
    ]


def test_frequencies_where_linux_reports_them(linux: Path) -> None:
    for core, khz in ((0, 2_000_000), (1, 3_000_000)):
        folder = linux / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text(f"{khz}\n")
        (folder / "scaling_governor").write_text("powersave\n")
    monitor = MachineMonitor()
    monitor.poll()
    found = monitor.conditions()
    assert found.cpu_mhz == Range(before=2500, after=2500, low=2500, high=2500)
    assert found.governor == "powersave"


def test_waiting_for_a_core_is_counted_over_all_threads(
    linux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 10 s one thread waited 3 s, and a new one half a second; a third has ended."""
    now = [0.0]
    monkeypatch.setattr("eps_core.machine.time.perf_counter", lambda: now[0])
    monitor = MachineMonitor()
    for moment, waits in ((0.0, {"1": 2.0, "7": 9.0}), (10.0, {"1": 5.0, "9": 0.5})):
        now[0] = moment
        shutil.rmtree(linux / "self", ignore_errors=True)
        for thread, wait in waits.items():
            folder = linux / "self" / "task" / thread
            folder.mkdir(parents=True)
            (folder / "schedstat").write_text(f"123456789 {int(wait * 1e9)} 42\n")
        monitor.poll()
    found = monitor.conditions()
    assert found.waited == pytest.approx(0.35)
    assert found.disturbances() == ["this process waited 35 % of the time for a core"]


def test_what_cannot_be_read_is_none(linux: Path) -> None:
    monitor = MachineMonitor()
    monitor.poll()
    monitor.poll()
    found = monitor.conditions()
    assert (found.others, found.stolen, found.waited) == (None, None, None)
    assert (found.cpu_mhz, found.governor, found.gpu) == (None, None, None)
    assert found.disturbances() == []
    json.dumps(asdict(found), allow_nan=False)


def test_the_machine_that_runs_this_test() -> None:
    with MachineMonitor() as monitor:
        monitor.poll()
        sum(range(300_000))
        monitor.poll()
        found = monitor.conditions()
    assert found.seconds > 0
    assert found.others is None or found.others >= 0  # in ticks of 10 ms: no more can be said
