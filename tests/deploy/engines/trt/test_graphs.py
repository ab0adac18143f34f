"""Recording a CUDA graph: it repeats the work, or says why not and leaves the stream usable."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt.cuda import Cuda, CudaGraphError, Stream, capture, load_bindings
from tests.deploy.engines.trt.fake_bindings import make_bindings
from tests.deploy.engines.trt.fake_gpu import FakeGpu
from tests.deploy.engines.trt.fake_pycuda import make_pycuda


class Bench:
    """A stream, and work for it that is counted when it is done."""

    def __init__(self) -> None:
        self.gpu = FakeGpu()
        self.bindings: Any = make_bindings(self.gpu)
        self.cuda = Cuda(driver=make_pycuda(self.gpu))
        with self.cuda.current():
            self.stream: Stream = self.cuda.stream()
        self.done = 0

    def _work(self) -> None:
        self.done += 1

    def enqueue(self) -> bool:
        self.gpu.queue(self.stream.handle).add(lambda: self._work)
        return True

    def check_usable(self) -> None:
        before = self.done
        self.enqueue()
        self.stream.synchronize()
        assert self.done == before + 1


@pytest.fixture
def bench() -> Any:
    made = Bench()
    with made.cuda.current():
        yield made
        made.check_usable()
        made.stream.free()
    made.gpu.check_clean()


def test_a_graph_repeats_what_was_recorded(bench: Bench) -> None:
    graph = capture(bench.bindings, bench.stream.handle, bench.enqueue)
    bench.stream.synchronize()
    assert bench.done == 0  # recorded, not run
    for _ in range(3):
        graph.launch(bench.stream.handle)
    bench.stream.synchronize()
    assert bench.done == 3
    graph.free()


@pytest.mark.parametrize(
    "call", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"]
)
def test_what_cannot_be_recorded(bench: Bench, call: str) -> None:
    bench.gpu.refuse[call] = 1
    with pytest.raises(CudaGraphError, match=f"{call}: CUDA_ERROR"):
        capture(bench.bindings, bench.stream.handle, bench.enqueue)


def test_work_that_is_refused(bench: Bench) -> None:
    with pytest.raises(CudaGraphError, match="cannot queue"):
        capture(bench.bindings, bench.stream.handle, lambda: False)


def test_work_that_raises(bench: Bench) -> None:
    """Ctrl-C in the wrong moment, say: the stream must not stay in capture."""

    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(bench.bindings, bench.stream.handle, interrupted)


def test_a_launch_that_fails(bench: Bench) -> None:
    graph = capture(bench.bindings, bench.stream.handle, bench.enqueue)
    bench.gpu.refuse["cuGraphLaunch"] = 1
    with pytest.raises(EngineError, match="cuGraphLaunch: CUDA_ERROR_OUT_OF_MEMORY"):
        graph.launch(bench.stream.handle)
    graph.free()


def test_a_driver_without_the_function(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda-bindings raises RuntimeError for what the installed driver does not have."""

    def missing(*arguments: Any) -> Any:
        raise RuntimeError('Function "cuGraphInstantiateWithFlags" not found')

    monkeypatch.setattr(bench.bindings, "cuGraphInstantiate", missing, raising=False)
    with pytest.raises(CudaGraphError, match="cuGraphInstantiateWithFlags"):
        capture(bench.bindings, bench.stream.handle, bench.enqueue)


def test_without_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(CudaGraphError, match=r"cuda-bindings is not there.*'eps-resnet\[trt\]'"):
        load_bindings()
