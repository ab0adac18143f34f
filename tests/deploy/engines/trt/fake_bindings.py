"""What looks like `cuda.bindings.driver` (13.5), on a `FakeGpu`: the functions that make graphs."""

from __future__ import annotations

import enum
from types import ModuleType
from typing import Any

from tests.deploy.engines.trt.fake_gpu import FakeGpu, Violation


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class CUstreamCaptureMode(enum.IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


_DONE, _FAILED = CUresult.CUDA_SUCCESS, CUresult.CUDA_ERROR_OUT_OF_MEMORY


class _Bindings(ModuleType):
    """Parameters are passed by position: the real functions take them in no other way."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__("cuda.bindings.driver")
        self._gpu = gpu
        self.CUresult, self.CUstreamCaptureMode = CUresult, CUstreamCaptureMode

    def cuStreamBeginCapture(self, stream: int, mode: Any, /) -> tuple[CUresult]:
        gpu = self._gpu
        gpu.require_context("cuStreamBeginCapture")
        if mode is not CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL:
            raise Violation("a capture that other threads can spoil")
        queue = gpu.queue(stream)
        if gpu.refused("cuStreamBeginCapture") or queue.recorded is not None:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        queue.recorded, queue.spoilt = [], False
        return (_DONE,)

    def cuStreamEndCapture(self, stream: int, /) -> tuple[CUresult, Any]:
        queue = self._gpu.queue(stream)
        recorded, queue.recorded = queue.recorded, None
        if recorded is None:
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        if self._gpu.refused("cuStreamEndCapture") or queue.spoilt:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        self._gpu.live["graph"] += 1
        return _DONE, recorded

    def cuGraphInstantiate(self, graph: Any, flags: int, /) -> tuple[CUresult, Any]:
        if flags:
            raise Violation("a graph that is launched from the device, or uploaded by itself")
        if self._gpu.refused("cuGraphInstantiate"):
            return _FAILED, None
        self._gpu.live["executable graph"] += 1
        return _DONE, tuple(graph)

    def cuGraphLaunch(self, executable: Any, stream: int, /) -> tuple[CUresult]:
        self._gpu.require_context("cuGraphLaunch")
        if self._gpu.refused("cuGraphLaunch"):
            return (_FAILED,)
        self._gpu.queue(stream).launch(executable)
        return (_DONE,)

    def cuGraphDestroy(self, graph: Any, /) -> tuple[CUresult]:
        self._gpu.live["graph"] -= 1
        return (_DONE,)

    def cuGraphExecDestroy(self, executable: Any, /) -> tuple[CUresult]:
        self._gpu.require_context("cuGraphExecDestroy")
        self._gpu.live["executable graph"] -= 1
        self._gpu.order.append("executable graph")
        return (_DONE,)


def make_bindings(gpu: FakeGpu) -> ModuleType:
    return _Bindings(gpu)
