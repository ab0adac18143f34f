"""CUDA memory, streams, events and graphs, through pycuda and cuda-bindings.

All work is done in the device's primary context, which torch and TensorRT use too, so that the
three can share a process. pycuda's rules about contexts and threads:

* a thread must pop every context that it pushed, or the process aborts when the thread ends;
* memory, streams and events can only be freed by a thread in which their context is current;
  elsewhere, by the garbage collector for example, they leak. Hence `free` on all of them, and
  :meth:`Cuda.current` around every use.
"""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from eps_core import machine
from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt.plan import Host, this_platform

# -- CUDA graphs: the launches of one inference, captured once and launched together
#
# pycuda has no graphs, so they come from cuda-bindings: its driver interface, which pycuda uses
# too, and which needs no newer driver than TensorRT itself.


class CudaGraphError(EngineError):
    """A graph could not be captured; the same work can still be launched without one."""


def load_bindings() -> Any:
    """Import `cuda.bindings.driver`. Raises CudaGraphError with the remedy."""
    try:
        return import_module("cuda.bindings.driver")
    except ImportError as error:
        raise CudaGraphError(
            f"cuda-bindings is not there ({error}); pip install 'eps-resnet[trt]'"
        ) from error


class Graph:
    """A captured inference; launching it repeats the work on the same addresses."""

    def __init__(self, driver: Any, executable: Any) -> None:
        self._driver = driver
        self._executable = executable

    def launch(self, stream: int) -> None:
        """Queue it in a stream, given by handle. Raises CudaGraphError when that fails."""
        _call(self._driver, "cuGraphLaunch", self._executable, stream)

    def free(self) -> None:
        _call(self._driver, "cuGraphExecDestroy", self._executable)


def capture(driver: Any, stream: int, enqueue: Callable[[], bool]) -> Graph:
    """Capture what `enqueue` queues in `stream` as a graph; it returns False when it could not.

    The same work must have run once before: the first run allocates, which a capture forbids.
    `driver` is the module from :func:`load_bindings`, `stream` the handle of a non-default stream
    with no pending work. Raises CudaGraphError for work that cannot be captured; none of it has run
    then, and the stream is usable.
    """
    # Thread local: other threads may allocate meanwhile without invalidating the capture.
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    _call(driver, "cuStreamBeginCapture", stream, mode)
    queued = False
    try:
        queued = enqueue()
    finally:
        # In any case: a stream that stays in capture mode never runs anything again.
        status, graph = driver.cuStreamEndCapture(stream)
        ended = status == driver.CUresult.CUDA_SUCCESS
        if ended and not queued:
            _call(driver, "cuGraphDestroy", graph)
    if not queued:
        raise CudaGraphError("TensorRT cannot queue this network while it is captured")
    if not ended:
        raise CudaGraphError(f"cuStreamEndCapture: {status.name}")
    try:
        return Graph(driver, _call(driver, "cuGraphInstantiate", graph, 0))
    finally:
        _call(driver, "cuGraphDestroy", graph)  # the executable graph is independent of it


def _call(driver: Any, name: str, *arguments: Any) -> Any:
    """Call a function of cuda-bindings; raises CudaGraphError for any status but success."""
    try:
        status, *results = getattr(driver, name)(*arguments)
    except RuntimeError as error:  # the driver is too old to have the function
        raise CudaGraphError(f"{name}: {error}") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise CudaGraphError(f"{name}: {status.name}")
    return results[0] if results else None


# -- The device, through pycuda

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy default stream


def load_pycuda() -> Any:
    """Import and initialise `pycuda.driver`. Raises EngineError with the remedy."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pycuda warns of what the error below says
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


class DeviceMemory:
    """GPU memory: `nbytes` at `address`."""

    def __init__(self, allocation: Any, nbytes: int) -> None:
        self.address, self.nbytes = int(allocation), nbytes
        self._allocation = allocation

    def free(self) -> None:
        self._allocation.free()


class HostMemory:
    """A page-locked array, for asynchronous copies. `free` it when no view of it exists."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        self._allocation: Any = array.base

    def free(self) -> None:
        del self.array
        self._allocation.free()


class Stream:
    """A CUDA stream, independent of the default stream."""

    def __init__(self, cuda: Cuda, stream: Any) -> None:
        self.handle = int(stream.handle)
        self.raw: Any = stream
        self._cuda = cuda

    def synchronize(self) -> None:
        """Wait for all work in the stream. Raises EngineError when any of it failed."""
        with self._cuda.errors("the GPU failed"):
            self.raw.synchronize()

    def free(self) -> None:
        del self.raw  # pycuda has no other way to destroy it


class Event:
    """A CUDA event: a point in a stream with its GPU time."""

    def __init__(self, cuda: Cuda, event: Any) -> None:
        self._event = event
        self._cuda = cuda

    def record(self, stream: Stream) -> None:
        with self._cuda.errors("cannot record an event"):
            self._event.record(stream.raw)

    def milliseconds_till(self, later: Event) -> float:
        """GPU time between two events that have both completed."""
        with self._cuda.errors("cannot read an event"):
            return float(self._event.time_till(later._event))

    def free(self) -> None:
        del self._event


class Cuda:
    """One GPU. All methods but `facts` must be called inside `with cuda.current():`.

    Args:
        device: its index, among those that CUDA_VISIBLE_DEVICES leaves visible.
        driver: the module to use; None: :func:`load_pycuda`.
        bindings: the module to capture graphs with; None: :func:`load_bindings`.

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
        """Make the primary context this thread's current one."""
        with self.errors("the context cannot be entered"):
            self._context.push()
        try:
            yield
        finally:
            with self.errors("the context cannot be left"):
                self._driver.Context.pop()

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Raise pycuda's errors in the block as EngineError, with `what` in the message."""
        try:
            yield
        except self._driver.Error as error:
            raise EngineError(f"CUDA: {what}: {error}") from error

    def facts(self) -> dict[str, Any]:
        """The fields of `Host` that describe the GPU and its driver."""
        with self.errors("the GPU does not answer"):
            major, minor = self._device.compute_capability()
            newest = self._driver.get_driver_version()
            return {
                "device": str(self._device.name()),
                "compute_capability": f"{major}.{minor}",
                "memory": int(self._device.total_memory()),
                "driver": machine.driver_version() or "",
                "cuda": f"{newest // 1000}.{newest % 1000 // 10}",
            }

    def graph_bindings(self) -> Any:
        """The module for :func:`capture`. Raises CudaGraphError when it is not installed."""
        return load_bindings() if self._bindings is None else self._bindings

    def free_memory(self) -> int:
        """Free GPU memory in bytes."""
        with self.errors("the GPU does not answer"):
            return int(self._driver.mem_get_info()[0])

    def allocate(self, nbytes: int) -> DeviceMemory:
        """Allocate GPU memory, aligned to at least 256 bytes."""
        with self.errors(f"cannot have {nbytes:,} bytes of the GPU's memory"):
            return DeviceMemory(self._driver.mem_alloc(nbytes), nbytes)

    def page_locked(self, shape: Sequence[int], dtype: npt.DTypeLike) -> HostMemory:
        """Allocate an uninitialised page-locked array."""
        with self.errors(f"cannot have a page-locked array of {list(shape)}"):
            return HostMemory(self._driver.pagelocked_empty(tuple(shape), np.dtype(dtype)))

    def stream(self) -> Stream:
        with self.errors("cannot make a stream"):
            return Stream(self, self._driver.Stream(_NON_BLOCKING))

    def event(self) -> Event:
        with self.errors("cannot make an event"):
            return Event(self, self._driver.Event())

    def copy_in(self, target: DeviceMemory, source: npt.NDArray[Any], stream: Stream) -> None:
        """Queue a copy to the GPU; `source` is page-locked and unchanged until it completes."""
        assert source.nbytes <= target.nbytes, "the copy does not fit the buffer"
        with self.errors("cannot copy to the GPU"):
            self._driver.memcpy_htod_async(target.address, source, stream.raw)

    def copy_out(self, target: npt.NDArray[Any], source: DeviceMemory, stream: Stream) -> None:
        """Queue a copy from the GPU; `target`, page-locked, is valid after `synchronize`."""
        assert target.nbytes <= source.nbytes, "the copy reads past the buffer"
        with self.errors("cannot copy from the GPU"):
            self._driver.memcpy_dtoh_async(target, source.address, stream.raw)


def host_facts(trt: Any, cuda: Cuda) -> Host:
    """This machine: the TensorRT package `trt` on the GPU `cuda`."""
    return Host(
        tensorrt=trt.__version__,
        flavour=trt.__name__.partition(".")[0],
        platform=this_platform(),
        **cuda.facts(),
    )


@cache
def _primary_context(driver: Any, device: int) -> Any:
    """The primary context, retained once per process and released when it ends.

    pycuda's release leaves the context current in the thread, and destroyed if nobody else retains
    it, which would break torch. Retaining it again for each engine would leak as much.
    """
    context = driver.Device(device).retain_primary_context()
    # pycuda's destructor fails for a primary context, with a message on stderr.
    atexit.register(context.detach)
    return context
