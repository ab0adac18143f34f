"""pycuda behind `Cuda`: what is missing is one line, and what is entered is left."""

from __future__ import annotations

import sys
import threading
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt.cuda import Cuda, host_facts, load_pycuda
from eps_deploy.engines.trt.plan import this_platform
from tests.deploy.engines.trt.fake_gpu import FakeGpu, Violation
from tests.deploy.engines.trt.fake_pycuda import make_pycuda
from tests.deploy.engines.trt.machine import Machine


def pretend(monkeypatch: pytest.MonkeyPatch, driver: Any) -> None:
    """`pycuda.driver` is this module; None: there is none."""
    package = ModuleType("pycuda")
    if driver is not None:
        package.__dict__["driver"] = driver
    monkeypatch.setitem(sys.modules, "pycuda", None if driver is None else package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)


def test_without_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    with pytest.raises(EngineError, match=r"^pycuda is not installed.*'eps-resnet\[trt\]'.*nvcc"):
        Cuda()


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """pycuda is there, and the driver's library that it was linked with is not."""

    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name != "driver":
                raise AttributeError(name)
            warnings.warn("Failed to import the CUDA driver interface", stacklevel=2)
            raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setitem(sys.modules, "pycuda", Broken("pycuda"))
    with pytest.raises(EngineError, match=r"libcuda\.so\.1.*install NVIDIA's driver") as caught:
        load_pycuda()
    assert "\n" not in str(caught.value)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    gpu.refuse["init"] = 1
    pretend(monkeypatch, make_pycuda(gpu))
    with pytest.raises(EngineError, match=r"no CUDA-capable device.*needs an NVIDIA GPU"):
        load_pycuda()


def test_another_gpu_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, make_pycuda(FakeGpu()))
    Cuda(0)
    for device in (1, -1):
        with pytest.raises(EngineError, match=f"GPU {device}: CUDA sees 1 here"):
            Cuda(device)


def test_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eps_core.machine.driver_version", lambda: "580.95.05")
    machine = Machine()
    assert machine.cuda.facts() == {
        "device": "NVIDIA Fake GPU",
        "compute_capability": "9.0",
        "memory": 2**30,
        "driver": "580.95.05",
        "cuda": "13.5",
    }
    host = host_facts(machine.trt, machine.cuda)
    assert (host.tensorrt, host.flavour) == ("11.4.0.106", "tensorrt")
    assert (host.compute_capability, host.device) == ("9.0", "NVIDIA Fake GPU")
    assert (host.memory, host.driver, host.cuda) == (2**30, "580.95.05", "13.5")
    assert host.platform == this_platform()


def test_the_context_is_current_in_the_block_alone() -> None:
    """In this thread, whatever happens in the block, and as often as it is entered."""
    gpu = FakeGpu()
    cuda = Cuda(driver=make_pycuda(gpu))
    elsewhere: list[int] = []
    with cuda.current(), cuda.current():
        assert len(gpu.stack) == 2
        thread = threading.Thread(target=lambda: elsewhere.append(len(gpu.stack)))
        thread.start()
        thread.join()
    assert elsewhere == [0]
    with pytest.raises(KeyError), cuda.current():
        raise KeyError
    assert not gpu.stack


def test_all_engines_of_a_process_share_one_retained_context() -> None:
    gpu = FakeGpu()
    driver = make_pycuda(gpu)
    for _ in range(3):
        Cuda(driver=driver)
    assert gpu.live["retained primary context"] == 1


def test_copies_there_and_back() -> None:
    gpu = FakeGpu()
    cuda = Cuda(driver=make_pycuda(gpu))
    with cuda.current():
        stream = cuda.stream()
        memory = cuda.allocate(64)
        host = cuda.page_locked((4, 4), np.float32)
        back = cuda.page_locked((4, 4), np.float32)
        assert memory.address % 256 == 0
        host.array[:] = np.arange(16).reshape(4, 4)
        cuda.copy_in(memory, host.array, stream)
        cuda.copy_out(back.array, memory, stream)
        assert np.isnan(back.array).all()
        stream.synchronize()
        assert back.array.tolist() == host.array.tolist()
        for thing in (host, back, memory, stream):
            thing.free()
    gpu.check_clean()


def test_copies_that_do_not_fit_are_our_own_mistake() -> None:
    cuda = Cuda(driver=make_pycuda(FakeGpu()))
    with cuda.current():
        stream, memory = cuda.stream(), cuda.allocate(8)
        large = cuda.page_locked((9,), np.uint8)
        with pytest.raises(AssertionError, match="does not fit"):
            cuda.copy_in(memory, large.array, stream)
        with pytest.raises(AssertionError, match="past the buffer"):
            cuda.copy_out(large.array, memory, stream)
        for thing in (large, memory, stream):
            thing.free()


def test_the_fake_is_as_strict_as_it_says() -> None:
    """What the tests of the engine rest on."""
    gpu = FakeGpu()
    driver = make_pycuda(gpu)
    cuda = Cuda(driver=driver)
    with pytest.raises(Violation, match="without a context"):
        cuda.allocate(8)
    with cuda.current():
        stream, memory = cuda.stream(), cuda.allocate(8)
        with pytest.raises(Violation, match="not in one piece of page-locked memory"):
            cuda.copy_in(memory, np.zeros(8, np.uint8), stream)
        host = cuda.page_locked((8,), np.uint8)
        cuda.copy_in(memory, host.array, stream)
        host.array[0] ^= 1
        with pytest.raises(Violation, match="has changed before"):
            stream.synchronize()
        cuda.copy_in(memory, host.array, stream)
        host.free()
        with pytest.raises(Violation, match="after it was freed"):
            stream.synchronize()
        memory.free()
        with pytest.raises(Violation, match="freed twice"):
            memory.free()
        with pytest.raises(Violation, match="default stream"):
            driver.Stream()
        with pytest.raises(Violation, match="keeps no time"):
            driver.Event(2)
        with pytest.raises(Violation, match="slow to read"):
            driver.pagelocked_empty((8,), np.uint8, "C", 4)
    del stream
    with pytest.raises(AssertionError, match="stream destroyed where no context is current"):
        gpu.check_clean()
