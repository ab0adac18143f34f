"""CUDA as an engine needs it, through pycuda: no other module knows pycuda.

All work is done in the device's primary context, the one that torch and TensorRT use, so that the
three can live in one process. pycuda has rules of its own about contexts and threads:

* what a thread pushes it must pop, or the process aborts when the thread ends;
* memory, streams and events can be freed by any thread in which their context is current, and by
  no other: freed elsewhere, by the garbage collector say, they leak. Hence `free` on all of them,
  and :meth:`Cuda.current` around every use.
"""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from eps_deploy.bench import machine
from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt.plan import Host, flavour, this_platform

# -- CUDA graphs: the many launches of one inference recorded once and then launched as one
#
# pycuda has none, so they come from cuda-bindings. Of its two interfaces the driver's is used: it
# is the one that pycuda speaks too, and asks for no newer driver than TensorRT itself.


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


_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy default stream


def load_pycuda() -> Any:
    """The module `pycuda.driver`, initialised. Raises EngineError with the remedy."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the error below says too
            from pycuda import driver
    except ModuleNotFoundError as error:
        raise EngineError(
            f"{error.name} is not installed; pip install 'eps-resnet[trt]'"
            " (pycuda is compiled then: the CUDA toolkit's nvcc must be on the PATH, or its"
            " headers be set up as in the Dockerfile)"
        ) from error
    except ImportError as error:
        raise EngineError(
            f"pycuda cannot be loaded ({error}); install NVIDIA's driver, or where there is one"
            " build pycuda again: pip install --force-reinstall --no-cache-dir pycuda"
        ) from error
    try:
        driver.init()
    except driver.Error as error:
        raise EngineError(
            f"CUDA does not start ({error}); TensorRT needs an NVIDIA GPU that this process may use"
        ) from error
    return driver


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """One GPU and its driver.

    Attributes:
        name: `NVIDIA H100 80GB HBM3`.
        compute_capability: `9.0`.
        total_memory: bytes.
        driver: version of the display driver; None where the system does not tell.
        cuda: newest CUDA that the driver knows, as `13.0`.
    """

    name: str
    compute_capability: str
    total_memory: int
    driver: str | None
    cuda: str


class DeviceMemory:
    """`nbytes` of the GPU's memory at `address`."""

    def __init__(self, allocation: Any, nbytes: int) -> None:
        self.address, self.nbytes = int(allocation), nbytes
        self._allocation = allocation

    def free(self) -> None:
        self._allocation.free()


class HostMemory:
    """A page-locked array: what can be copied while the processor goes on.

    Its memory is gone after `free`: no view of `array` may be left then.
    """

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        self._allocation: Any = array.base

    def free(self) -> None:
        del self.array
        self._allocation.free()


class Stream:
    """A queue of work for the GPU, independent of the default stream."""

    def __init__(self, cuda: Cuda, stream: Any) -> None:
        self.handle = int(stream.handle)
        self.raw: Any = stream
        self._cuda = cuda

    def synchronize(self) -> None:
        """Wait for all work in it. Raises EngineError when any of it failed."""
        with self._cuda.errors("the GPU failed"):
            self.raw.synchronize()

    def free(self) -> None:
        del self.raw  # pycuda destroys it then, having no other way


class Event:
    """A point in a stream, whose time the GPU takes."""

    def __init__(self, cuda: Cuda, event: Any) -> None:
        self._event = event
        self._cuda = cuda

    def record(self, stream: Stream) -> None:
        with self._cuda.errors("cannot record an event"):
            self._event.record(stream.raw)

    def milliseconds_till(self, later: Event) -> float:
        """GPU time between two events that both have happened."""
        with self._cuda.errors("cannot read an event"):
            return float(self._event.time_till(later._event))

    def free(self) -> None:
        del self._event


class Cuda:
    """One GPU.

    Everything but the constructor and `facts` must run inside `with cuda.current():`.

    Args:
        device: its index, among those that CUDA_VISIBLE_DEVICES leaves visible.
        driver: the module to use; None: :func:`load_pycuda`.
        bindings: the module to make graphs with; None: `graphs.load_bindings`.

    Raises:
        EngineError: no pycuda, no driver, no such device.
    """

    def __init__(self, device: int = 0, *, driver: Any = None, bindings: Any = None) -> None:
        self._driver = load_pycuda() if driver is None else driver
        self._bindings = bindings
        with self.errors("the GPU cannot be used"):
            present = self._driver.Device.count()
            if not 0 <= device < present:
                raise EngineError(
                    f"GPU {device}: CUDA sees {present} here, counted from 0"
                    " (CUDA_VISIBLE_DEVICES hides others)"
                )
            self._device: Any = self._driver.Device(device)
            self._context: Any = _primary_context(self._driver, device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """The primary context is this thread's current one in the block."""
        with self.errors("the context cannot be entered"):
            self._context.push()
        try:
            yield
        finally:
            with self.errors("the context cannot be left"):
                self._driver.Context.pop()

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """pycuda's errors in the block become an EngineError that begins with `what`."""
        try:
            yield
        except self._driver.Error as error:
            raise EngineError(f"CUDA: {what}: {error}") from error

    def facts(self) -> DeviceFacts:
        with self.errors("the GPU does not answer"):
            major, minor = self._device.compute_capability()
            newest = self._driver.get_driver_version()
            return DeviceFacts(
                name=str(self._device.name()),
                compute_capability=f"{major}.{minor}",
                total_memory=int(self._device.total_memory()),
                driver=machine.driver_version(),
                cuda=f"{newest // 1000}.{newest % 1000 // 10}",
            )

    def graph_bindings(self) -> Any:
        """What :func:`graphs.capture` needs. Raises GraphError where it is not installed."""
        return load_bindings() if self._bindings is None else self._bindings

    def free_memory(self) -> int:
        """Bytes of the GPU's memory that nobody has."""
        with self.errors("the GPU does not answer"):
            return int(self._driver.mem_get_info()[0])

    def allocate(self, nbytes: int) -> DeviceMemory:
        """Memory of the GPU, aligned to 256 bytes at least."""
        with self.errors(f"cannot have {nbytes:,} bytes of the GPU's memory"):
            return DeviceMemory(self._driver.mem_alloc(nbytes), nbytes)

    def page_locked(self, shape: Sequence[int], dtype: npt.DTypeLike) -> HostMemory:
        """An uninitialised array in host memory that stays where it is."""
        with self.errors(f"cannot have a page-locked array of {list(shape)}"):
            return HostMemory(self._driver.pagelocked_empty(tuple(shape), np.dtype(dtype)))

    def stream(self) -> Stream:
        with self.errors("cannot make a stream"):
            return Stream(self, self._driver.Stream(_NON_BLOCKING))

    def event(self) -> Event:
        with self.errors("cannot make an event"):
            return Event(self, self._driver.Event())

    def copy_in(self, target: DeviceMemory, source: npt.NDArray[Any], stream: Stream) -> None:
        """Queue a copy to the GPU; `source` is page-locked, and left alone until it is done."""
        assert source.nbytes <= target.nbytes, "the copy does not fit the buffer"
        with self.errors("cannot copy to the GPU"):
            self._driver.memcpy_htod_async(target.address, source, stream.raw)

    def copy_out(self, target: npt.NDArray[Any], source: DeviceMemory, stream: Stream) -> None:
        """Queue a copy from the GPU; `target`, page-locked, holds it after `synchronize`."""
        assert target.nbytes <= source.nbytes, "the copy reads past the buffer"
        with self.errors("cannot copy from the GPU"):
            self._driver.memcpy_dtoh_async(target, source.address, stream.raw)


def host_facts(trt: Any, cuda: Cuda) -> Host:
    """The machine, as a sidecar wants it: this TensorRT on this GPU."""
    facts = cuda.facts()
    return Host(
        tensorrt=trt.__version__,
        flavour=flavour(trt),
        compute_capability=facts.compute_capability,
        device=facts.name,
        memory=facts.total_memory,
        driver=facts.driver or "",
        cuda=facts.cuda,
        platform=this_platform(),
    )


@cache
def _primary_context(driver: Any, device: int) -> Any:
    """Retained once a process and released when it ends.

    pycuda's release leaves the context current in the thread, and destroyed if nobody else holds
    it: torch would then stumble over it. To retain it again for each engine would leak as much.
    """
    context = driver.Device(device).retain_primary_context()
    # Its destructor takes it for another kind of context, fails, and says so on stderr.
    atexit.register(context.detach)
    return context
