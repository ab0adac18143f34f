"""CUDA graphs: the many launches of one inference recorded once and then launched as one.

pycuda has none, so they come from cuda-bindings. Of its two interfaces the driver's is used: it is
the one that pycuda speaks too, and asks for no newer driver than TensorRT itself.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from eps_deploy.engines.base import EngineError


class GraphError(EngineError):
    """No graph could be made; the same work can still be queued launch by launch."""


def load_bindings() -> Any:
    """The module `cuda.bindings.driver`. Raises GraphError with the remedy."""
    try:
        return import_module("cuda.bindings.driver")
    except ImportError as error:
        raise GraphError(
            f"cuda-bindings is not there ({error}); pip install 'eps-resnet[trt]'"
        ) from error


class Graph:
    """One recorded inference; launching it repeats the work, on the same addresses."""

    def __init__(self, driver: Any, executable: Any) -> None:
        self._driver = driver
        self._executable = executable

    def launch(self, stream: int) -> None:
        """Queue it in the stream of this handle. Raises EngineError when that fails."""
        _call(self._driver, "cuGraphLaunch", self._executable, stream)

    def free(self) -> None:
        _call(self._driver, "cuGraphExecDestroy", self._executable)


def capture(driver: Any, stream: int, enqueue: Callable[[], bool]) -> Graph:
    """A graph of what `enqueue` queues in `stream`.

    The same work must have run once before: the first run allocates, which a capture forbids.

    Args:
        driver: what :func:`load_bindings` gave.
        stream: handle of a non-default stream with nothing left to do.
        enqueue: queues the work; False when it could not.

    Raises:
        GraphError: the work cannot be captured; nothing of it has run, and the stream is usable.
    """
    graph = _record(driver, stream, enqueue)
    try:
        return Graph(driver, _call(driver, "cuGraphInstantiate", graph, 0))
    finally:
        _call(driver, "cuGraphDestroy", graph)  # the executable one is independent of it


def _record(driver: Any, stream: int, enqueue: Callable[[], bool]) -> Any:
    # Thread local: what other threads do meanwhile (allocate, say) does not spoil the capture.
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    _call(driver, "cuStreamBeginCapture", stream, mode)
    queued = False
    try:
        queued = enqueue()
    finally:
        # In any case: a stream that stays in capture never runs anything again.
        status, graph = driver.cuStreamEndCapture(stream)
        ended = status == driver.CUresult.CUDA_SUCCESS
        if ended and not queued:
            _call(driver, "cuGraphDestroy", graph)
    if not queued:
        raise GraphError("TensorRT cannot queue this network while it is recorded")
    if not ended:
        raise GraphError(f"cuStreamEndCapture: {status.name}")
    return graph


def _call(driver: Any, name: str, *arguments: Any) -> Any:
    """What a function of cuda-bindings returns beside its status, or GraphError."""
    try:
        status, *results = getattr(driver, name)(*arguments)
    except RuntimeError as error:  # the driver is too old to have the function
        raise GraphError(f"{name}: {error}") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise GraphError(f"{name}: {status.name}")
    return results[0] if results else None
