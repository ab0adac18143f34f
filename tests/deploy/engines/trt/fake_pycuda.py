"""What looks like `pycuda.driver` (2026.1), on a `FakeGpu`; names and parameters are its own.

A flag that an engine has no use for is a `Violation`: it would cost time or fail on a real GPU.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.deploy.engines.trt.fake_gpu import POISON, Block, FakeGpu, Queue, Violation, Work

_NON_BLOCKING = 1
_TIMED = 0  # CU_EVENT_DEFAULT; CU_EVENT_DISABLE_TIMING is 2
MS_A_COPY = 0.125  # of the GPU's time
_CACHED = 0  # page-locked memory that the processor reads quickly; write-combined is 4


class Error(Exception):
    """pycuda's own; LogicError, MemoryError and the others are derived from it."""


class Context:
    def __init__(self, gpu: FakeGpu, ordinal: int) -> None:
        self._gpu, self._ordinal = gpu, ordinal

    def push(self) -> None:
        self._gpu.entered.add(self._ordinal)
        self._gpu.stack.append(self)

    def detach(self) -> None:
        kind = "retained primary context"
        left = {name for name, count in self._gpu.live.items() if count} - {kind}
        if left:
            self._gpu.leaks.append(f"the context was detached before {', '.join(sorted(left))}")
        self._gpu.live[kind] -= 1


class Device:
    gpu: FakeGpu

    def __init__(self, ordinal: int) -> None:
        if not 0 <= ordinal < self.gpu.devices:
            raise Error("cuDeviceGet failed: invalid device ordinal")
        self._ordinal = ordinal

    @classmethod
    def count(cls) -> int:
        return cls.gpu.devices

    def name(self) -> str:
        return "NVIDIA Fake GPU"

    def compute_capability(self) -> tuple[int, int]:
        return self.gpu.capability

    def total_memory(self) -> int:
        return self.gpu.memory

    def retain_primary_context(self) -> Context:
        self.gpu.live["retained primary context"] += 1
        return Context(self.gpu, self._ordinal)


class _Mortal:
    """What pycuda frees in its destructor, which does nothing where the context is not current."""

    gpu: FakeGpu
    kind: str
    born = False

    def __init__(self) -> None:
        self.gpu.require_context(self.kind)
        self.gpu.live[self.kind] += 1
        self.born = True

    def __del__(self) -> None:
        if not self.born:
            return
        if self.gpu.stack:
            self.gpu.live[self.kind] -= 1
            self.gpu.order.append(self.kind)
        else:
            self.gpu.leaks.append(f"{self.kind} destroyed where no context is current")


class Stream(_Mortal):
    kind = "stream"

    def __init__(self, flags: int = 0) -> None:
        if flags != _NON_BLOCKING:
            raise Violation("a stream that waits for the default stream")
        super().__init__()
        self.handle = self.gpu.handle()
        self._queue = self.gpu.queues[self.handle] = Queue(self.handle)

    def synchronize(self) -> None:
        self.gpu.require_context("synchronize")
        with self.gpu.lock:
            if self._queue.recorded is not None:
                self._queue.spoilt = True
                raise Error("cuStreamSynchronize failed: not permitted when stream is capturing")
            if self.gpu.refused("synchronize"):
                raise Error("cuStreamSynchronize failed: an illegal memory access was encountered")
            self.gpu.wait(self._queue)

    def __del__(self) -> None:
        super().__del__()
        if self.born and self._queue.waiting:
            self.gpu.leaks.append("a stream destroyed with work in it")
        if self.born:
            self.gpu.queues.pop(self.handle)


class Event(_Mortal):
    kind = "event"

    def __init__(self, flags: int = 0) -> None:
        if flags != _TIMED:
            raise Violation("an event that keeps no time")
        super().__init__()
        self.time: float | None = None

    def record(self, stream: Stream) -> Event:
        self.gpu.require_context("record")

        def happen() -> None:
            self.time = self.gpu.clock

        self.gpu.queue(stream.handle).add(lambda: happen)
        return self

    def time_till(self, end: Event) -> float:
        if self.time is None or end.time is None:
            raise Error("cuEventElapsedTime failed: device not ready")
        return end.time - self.time


class DeviceAllocation:
    def __init__(self, gpu: FakeGpu, block: Block) -> None:
        self._gpu, self._block = gpu, block

    def __int__(self) -> int:
        return self._block.address

    def free(self) -> None:
        self._gpu.free(self._block)


class PagelockedHostAllocation(DeviceAllocation):
    """The `base` of a page-locked array."""

    def __init__(self, gpu: FakeGpu, block: Block, shape: tuple[int, ...], kind: str) -> None:
        super().__init__(gpu, block)
        data = (block.address, False)
        self.__array_interface__ = {"data": data, "shape": shape, "typestr": kind, "version": 3}


class _Pycuda(ModuleType):
    Error = Error

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__("pycuda.driver")
        self._gpu = gpu
        for kind in (Device, Stream, Event):
            setattr(self, kind.__name__, type(kind.__name__, (kind,), {"gpu": gpu}))

        class ThisContext(Context):
            @staticmethod
            def pop() -> None:
                if not gpu.stack:
                    raise Error("context::pop failed: invalid device context")
                gpu.stack.pop()

        self.Context = ThisContext

    def init(self, flags: int = 0) -> None:
        if flags:
            raise Error("cuInit failed: invalid argument")
        self._attempt("init", "no CUDA-capable device is detected")

    def get_driver_version(self) -> int:
        return 13050

    def mem_get_info(self) -> tuple[int, int]:
        self._gpu.require_context("mem_get_info")
        living = [b for b in self._gpu.blocks if b.alive and b.kind == "device"]
        return self._gpu.memory - sum(len(b.content) for b in living), self._gpu.memory

    def mem_alloc(self, nbytes: int) -> DeviceAllocation:
        self._attempt("mem_alloc", "out of memory")
        if nbytes < 1:
            raise Error("cuMemAlloc failed: invalid argument")
        return DeviceAllocation(self._gpu, self._gpu.allocate("device", nbytes))

    def pagelocked_empty(
        self, shape: tuple[int, ...], dtype: Any, order: str = "C", mem_flags: int = 0
    ) -> npt.NDArray[Any]:
        if mem_flags != _CACHED:
            raise Violation("page-locked memory that is slow to read, or mapped for nothing")
        if order != "C":
            raise Violation("an array whose rows are not in one piece")
        self._attempt("pagelocked_empty", "out of memory")
        kind = np.dtype(dtype)
        block = self._gpu.allocate("page-locked", int(np.prod(shape)) * kind.itemsize)
        return np.asarray(PagelockedHostAllocation(self._gpu, block, shape, kind.str))

    def memcpy_htod_async(self, dest: int, src: npt.NDArray[Any], stream: Stream) -> None:
        gpu = self._gpu
        gpu.require_context("memcpy_htod_async")
        self._attempt("memcpy_htod_async", "invalid argument")
        source = gpu.host(src)
        address, nbytes = source.ctypes.data, len(source)
        gpu.at(int(dest), nbytes, "device")
        gpu.claim(int(dest), stream.handle)

        def start() -> Work:
            before = gpu.at(address, nbytes, "page-locked").tobytes()

            def copy() -> None:
                if gpu.at(address, nbytes, "page-locked").tobytes() != before:
                    raise Violation("what was to be copied has changed before the copy was made")
                gpu.at(int(dest), nbytes, "device")[:] = source
                gpu.clock += MS_A_COPY

            return copy

        gpu.queue(stream.handle).add(start)

    def memcpy_dtoh_async(self, dest: npt.NDArray[Any], src: int, stream: Stream) -> None:
        gpu = self._gpu
        gpu.require_context("memcpy_dtoh_async")
        self._attempt("memcpy_dtoh_async", "invalid argument")
        target = gpu.host(dest)
        address = target.ctypes.data
        gpu.at(int(src), len(target), "device")
        gpu.claim(int(src), stream.handle)

        def copy() -> None:
            gpu.at(address, len(target), "page-locked")[:] = gpu.at(int(src), len(target), "device")
            gpu.clock += MS_A_COPY

        def start() -> Work:
            target[:] = POISON
            return copy

        gpu.queue(stream.handle).add(start)

    def _attempt(self, name: str, reason: str) -> None:
        if self._gpu.refused(name):
            raise Error(f"{name} failed: {reason}")


def make_pycuda(gpu: FakeGpu) -> ModuleType:
    return _Pycuda(gpu)
