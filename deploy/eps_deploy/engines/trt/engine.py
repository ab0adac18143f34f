"""The TensorRT engine: runs a plan on the GPU that it was built for."""

from __future__ import annotations

import atexit
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from eps_deploy.engines.base import (
    INPUT_NAME,
    OUTPUT_NAME,
    EngineError,
    Images,
    Logits,
    check_images,
    padded_sizes,
)
from eps_deploy.engines.trt.cuda import Cuda, CudaGraphError, Event, Graph, capture, host_facts
from eps_deploy.engines.trt.plan import (
    PLAN,
    Messages,
    PlanMetadata,
    Profile,
    collect_messages,
    load_tensorrt,
    logger_of,
)

# -- A plan in the GPU's memory

_PORTS = [(INPUT_NAME, "INPUT", "UINT8"), (OUTPUT_NAME, "OUTPUT", "FLOAT")]


class LoadedPlan:
    """A deserialized plan; everything about it must run inside `cuda.current()`.

    A plan is executable code: the caller has checked its metadata before. `host_code` tells whether
    it may contain CPU code, as a version-compatible plan does; `scratch` is the bytes of GPU memory
    that an inference needs besides its input and output.

    Raises EngineError: TensorRT does not load it, or it is not a plan of eps-deploy.
    """

    def __init__(self, plan: bytes, *, trt: Any, name: str, host_code: bool) -> None:
        self.trt, self.name = trt, name
        self._creating = threading.Lock()
        self._runtime: Any = None
        self._engine: Any = None
        try:
            with collect_messages(trt) as messages:
                self._runtime = trt.Runtime(logger_of(trt))
                if host_code:
                    self._runtime.engine_host_code_allowed = True
                self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise EngineError(
                    f"{name}: TensorRT does not load it: {messages.reason()};"
                    " build it again on this machine"
                )
            self._read_signature()
        except BaseException:
            self.free()  # here, where the GPU is current, and not when the traceback is forgotten
            raise

    def _read_signature(self) -> None:
        # No local name for the engine: a traceback would keep it.
        found = []
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            mode, dtype = self._engine.get_tensor_mode(name), self._engine.get_tensor_dtype(name)
            found.append((name, mode.name, dtype.name))
        if found != _PORTS:
            raise EngineError(
                f"{self.name}: not a plan of eps-deploy (its inputs and outputs are {found},"
                f" not {_PORTS})"
            )
        profiles: list[Profile] = []
        for index in range(self._engine.num_optimization_profiles):
            shapes = self._engine.get_tensor_profile_shape(INPUT_NAME, index)
            smallest, optimal, largest = (int(shape[0]) for shape in shapes)
            profiles.append((smallest, optimal, largest))
        self.profiles = tuple(profiles)
        batch, *image = tuple(self._engine.get_tensor_shape(INPUT_NAME))
        rows, *classes = tuple(self._engine.get_tensor_shape(OUTPUT_NAME))
        # TensorRT may fix the batch size when there is only one.
        free = {-1, 1} if self.profiles == ((1, 1, 1),) else {-1}
        if not {batch, rows} <= free or len(image) != 3 or len(classes) != 1:
            raise EngineError(
                f"{self.name}: not a plan of eps-deploy (it takes {[batch, *image]} and gives"
                f" {[rows, *classes]})"
            )
        self.input_shape = (int(image[0]), int(image[1]), int(image[2]))
        self.classes = int(classes[0])
        self.scratch = int(self._engine.device_memory_size_v2)  # of the largest profile

    @property
    def max_batch(self) -> int:
        return self.profiles[-1][2]

    def profile_of(self, size: int) -> int:
        """Index of the optimization profile for batches of this size."""
        return next(i for i, (_, _, largest) in enumerate(self.profiles) if size <= largest)

    def create_context(self) -> Any:
        """Create an `IExecutionContext`, still without memory."""
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._creating, collect_messages(self.trt) as messages:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(
                f"{self.name}: TensorRT makes no execution context: {messages.reason()}"
            )
        return context

    def free(self) -> None:
        """Free the plan, after its contexts."""
        self._engine = None  # first: the runtime made it
        self._runtime = None


# -- One inference at a time: a stream, buffers, and per batch size a TensorRT context and a graph
#
# The buffers are allocated once, for the largest batch. A CUDA graph fixes shape, addresses and
# context, and TensorRT keeps state in a context while it is captured; so each batch size has an
# `IExecutionContext` of its own. They share their scratch memory: only one runs at a time. A batch
# is padded to the next of `padded_sizes` with whatever images the buffer still holds, and the
# logits of these are never read.


class BrokenError(EngineError):
    """The GPU failed, and this process cannot use it any more."""


class _Resource(Protocol):
    def free(self) -> None: ...


_R = TypeVar("_R", bound=_Resource)


class ExecutionContext:
    """Runs a plan for one caller at a time; everything must run inside `cuda.current()`.

    `bindings` is `cuda.bindings.driver`; None: run without graphs. Raises EngineError when there is
    not enough memory.
    """

    def __init__(self, plan: LoadedPlan, cuda: Cuda, bindings: Any | None) -> None:
        self._plan, self._cuda, self._bindings = plan, cuda, bindings
        self._sizes = padded_sizes(plan.max_batch)
        # By batch size. Attributes from the start: a traceback must not own one of TensorRT's.
        self._contexts: dict[int, Any] = {}
        self._ready: set[int] = set()
        self.graphs: dict[int, Graph] = {}  # copies included
        self.enqueued: dict[int, str] = {}  # why there is no graph
        self._bare: dict[int, Graph] = {}  # without copies, for `time_on_device`
        self._events: list[Event] = []
        images = (plan.max_batch, *plan.input_shape)
        logits = (plan.max_batch, plan.classes)
        with ExitStack() as owned:
            self._stream = _owned_by(owned, cuda.stream())
            self._images = _owned_by(owned, cuda.allocate(math.prod(images)))
            self._logits = _owned_by(owned, cuda.allocate(math.prod(logits) * 4))
            self._scratch = _owned_by(owned, cuda.allocate(max(plan.scratch, 1)))
            self._host_images = _owned_by(owned, cuda.page_locked(images, np.uint8))
            self._host_logits = _owned_by(owned, cuda.page_locked(logits, np.float32))
            self._owned = owned.pop_all()

    def infer(self, images: Images) -> Logits:
        """As `Engine.infer`, for images that were checked already."""
        with self._settled(), collect_messages(self._plan.trt) as messages:
            size = self._stage(images)
            self._prepare(size, messages)
            enqueue = partial(self._enqueue_whole, size)
            self._launch(self.graphs.get(size), enqueue, messages)
            self._stream.synchronize()
            logits: Logits = self._host_logits.array[: len(images)].copy()
            return logits

    def time_on_device(self, images: Images, runs: int) -> npt.NDArray[np.float64]:
        """As `TrtEngine.time_on_device`."""
        while len(self._events) < 2 * runs:
            self._events.append(_owned_by(self._owned, self._cuda.event()))
        begins, ends = self._events[:runs], self._events[runs : 2 * runs]
        with self._settled(), collect_messages(self._plan.trt) as messages:
            size = self._stage(images)
            self._prepare(size, messages)
            enqueue = partial(self._enqueue, size)
            if size in self.graphs and size not in self._bare:
                self._bare[size] = self._capture(enqueue)
            run = partial(self._launch, self._bare.get(size), enqueue, messages)
            self._copy_in(size)
            # An untimed run goes first and keeps the GPU busy, so that no timed run includes the
            # latency of its launch.
            run()
            for begin, end in zip(begins, ends, strict=True):
                begin.record(self._stream)
                run()
                end.record(self._stream)
            self._stream.synchronize()
        return np.array([b.milliseconds_till(e) for b, e in zip(begins, ends, strict=True)])

    def warm_up(self) -> None:
        """Prepare every padded batch size; see `padded_sizes`."""
        with self._settled(), collect_messages(self._plan.trt) as messages:
            for size in self._sizes:
                self._prepare(size, messages)

    def release(self) -> None:
        """Wait for the GPU, then free graphs and contexts. Call it before the plan is freed."""
        with ExitStack() as steps:  # backwards, and each of them even if one before it fails
            steps.callback(self._contexts.clear)
            for graph in (*self.graphs.values(), *self._bare.values()):
                steps.callback(graph.free)
            steps.callback(self._stream.synchronize)

    def free(self) -> None:
        """Free memory and stream. Call it after the plan was freed."""
        self._owned.close()

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """When the block fails, wait until the GPU no longer uses the buffers."""
        try:
            yield
        except BaseException as failure:
            try:
                self._stream.synchronize()
            except EngineError as broken:
                raise BrokenError(
                    f"{self._plan.name}: {broken}; this process cannot use the GPU any more:"
                    " start it again"
                ) from failure
            raise

    def _stage(self, images: Images) -> int:
        """Put the images into page-locked memory; return the padded size of their batch."""
        np.copyto(self._host_images.array[: len(images)], images, casting="no")
        return next(size for size in self._sizes if size >= len(images))

    # What an inference queues. None of it may allocate or wait: it is captured as a graph.

    def _copy_in(self, size: int) -> None:
        self._cuda.copy_in(self._images, self._host_images.array[:size], self._stream)

    def _copy_out(self, size: int) -> None:
        self._cuda.copy_out(self._host_logits.array[:size], self._logits, self._stream)

    def _enqueue(self, size: int) -> bool:
        done: bool = self._contexts[size].execute_async_v3(self._stream.handle)
        return done

    def _enqueue_whole(self, size: int) -> bool:
        self._copy_in(size)
        if not self._enqueue(size):
            return False
        self._copy_out(size)
        return True

    def _launch(self, graph: Graph | None, enqueue: Callable[[], bool], messages: Messages) -> None:
        if graph is not None:
            graph.launch(self._stream.handle)
        else:
            self._require(enqueue(), "queues no inference", messages)

    def _prepare(self, size: int, messages: Messages) -> None:
        """At the first use of a batch size: a context with shape and addresses, and its graph."""
        if size in self._ready:
            return
        if size not in self._contexts:
            self._contexts[size] = self._plan.create_context()
        self._set(self._contexts[size], size, messages)
        if self._bindings is not None:
            # Once without capture: TensorRT allocates in the first run.
            self._require(self._enqueue(size), "queues no inference", messages)
            self._stream.synchronize()
            try:
                self.graphs[size] = self._capture(partial(self._enqueue_whole, size))
            except EngineError as error:  # of the capture or of a copy in it
                self.enqueued[size] = str(error)
        self._ready.add(size)

    def _capture(self, enqueue: Callable[[], bool]) -> Graph:
        return capture(self._bindings, self._stream.handle, enqueue)

    def _set(self, context: Any, size: int, messages: Messages) -> None:
        profile = self._plan.profile_of(size)
        selected = context.set_optimization_profile_async(profile, self._stream.handle)
        self._require(selected, f"does not select optimization profile {profile}", messages)
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        shape = (size, *self._plan.input_shape)
        accepted = context.set_input_shape(INPUT_NAME, shape)
        self._require(accepted, f"does not take images of the shape {list(shape)}", messages)
        unknown = context.infer_shapes()
        self._require(not unknown, f"does not know the shape of {unknown}", messages)
        found = tuple(context.get_tensor_shape(OUTPUT_NAME))
        right = found == (size, self._plan.classes)
        self._require(right, f"gives logits of the shape {list(found)}", messages)
        for name, memory in ((INPUT_NAME, self._images), (OUTPUT_NAME, self._logits)):
            taken = context.set_tensor_address(name, memory.address)
            self._require(taken, f"does not take the address of {name}", messages)

    def _require(self, right: bool, failure: str, messages: Messages) -> None:
        if not right:
            raise EngineError(f"{self._plan.name}: TensorRT {failure}: {messages.reason()}")


def _owned_by(stack: ExitStack, resource: _R) -> _R:
    stack.callback(resource.free)
    return resource


# -- The engine


class TrtEngine:
    """A TensorRT plan on its GPU; an `Engine` (see `engines.base`).

    Any thread may call it. Each call takes one of `contexts` execution contexts, each with a
    stream and buffers of its own, and waits while all are taken. With two, the images of one
    inference are copied while another computes. A batch runs padded to the next of
    `padded_sizes(max_batch)`, each of which is one CUDA graph with the copies in it.

    After a failed call the engine stays usable, unless the error says otherwise.

    Args:
        plan: the bytes of `model.plan`.
        metadata: the content of `model.plan.json`.
        device: index of the GPU.
        name: name of the plan in error messages.
        contexts: number of inferences in flight; each takes GPU memory for its buffers.
        trt, cuda: the package and the GPU to use; None: `tensorrt`, and the GPU `device`.
        use_graphs: whether to launch each padded batch size as a CUDA graph; `describe` tells
            whether that was possible.

    Raises:
        EngineError: TensorRT, CUDA or the GPU is missing; the plan was built for another machine
            or is not the one that the metadata describes; the GPU's memory is too small.
    """

    def __init__(
        self,
        plan: bytes,
        metadata: PlanMetadata,
        *,
        device: int = 0,
        name: str = PLAN,
        contexts: int = 1,
        trt: Any = None,
        cuda: Cuda | None = None,
        use_graphs: bool = True,
    ) -> None:
        self._trt: Any = load_tensorrt() if trt is None else trt
        self._cuda = Cuda(device) if cuda is None else cuda
        self._metadata, self._name = metadata, name
        self._host = host_facts(self._trt, self._cuda)
        metadata.check(plan, self._host, name=name)
        bindings: Any = None
        self._no_graphs: str | None = None
        try:
            if use_graphs:
                bindings = self._cuda.graph_bindings()
            else:
                self._no_graphs = "not asked for"
        except CudaGraphError as error:
            self._no_graphs = str(error)
        self._changed = threading.Condition()
        self._contexts: list[ExecutionContext] = []
        self._closing = False
        self._broken: str | None = None
        with self._cuda.current(), ExitStack() as undo:
            self._plan = LoadedPlan(
                plan, trt=self._trt, name=name, host_code=metadata.version_compatible
            )
            undo.callback(self._plan.free)
            if self._plan.profiles != metadata.profiles:
                built, told = (
                    " and ".join(map(str, profiles))
                    for profiles in (self._plan.profiles, metadata.profiles)
                )
                raise EngineError(
                    f"{name}: takes batches of {built or 'no profile'} (smallest, optimal, largest)"
                    f" where its metadata says {told}; rebuild it with eps-deploy --engine trt"
                )
            for _ in range(contexts):
                context = ExecutionContext(self._plan, self._cuda, bindings)
                undo.callback(context.free)
                self._contexts.append(context)
            undo.pop_all()
        self.input_shape, self.classes = self._plan.input_shape, self._plan.classes
        self.max_batch = self._plan.max_batch
        self._idle = [*self._contexts]
        # After the primary context's release was registered (see `cuda`), so before it at exit:
        # TensorRT's objects must not outlive the context. Weakly: this must not keep the engine.
        self._at_exit = partial(_close_living, weakref.ref(self))
        atexit.register(self._at_exit)

    def infer(self, images: Images) -> Logits:
        """Logits float32 `[N, classes]` of images uint8 `[N, C, H, W]`, 1 <= N <= max_batch."""
        check_images(images, self.input_shape, self.max_batch)
        with self._context() as context:
            return context.infer(images)

    def warm_up(self) -> None:
        """Prepare every padded batch size in every execution context; calls wait meanwhile."""
        with ExitStack() as taken:
            for _ in self._contexts:
                taken.enter_context(self._context()).warm_up()

    def time_on_device(self, images: Images, runs: int) -> npt.NDArray[np.float64]:
        """GPU time in milliseconds of each of `runs` inferences of the batch `images`, `[runs]`.

        Measured with CUDA events, and without copies: the images are on the GPU already and the
        logits stay there.
        """
        check_images(images, self.input_shape, self.max_batch)
        with self._context() as context:
            return context.time_on_device(images, runs)

    def describe(self) -> dict[str, Any]:
        batches = {batch for context in self._contexts for batch in tuple(context.graphs)}
        enqueued: dict[int, str] = {}
        for context in self._contexts:
            enqueued |= dict(context.enqueued)
        return {
            "name": "trt",
            "runtime": "tensorrt",
            "version": str(self._trt.__version__),
            "provider": "TensorRT",
            "threads": 1,
            "max_batch": self.max_batch,
            "opt_batch": self._plan.profiles[-1][1],
            "precision": self._metadata.precision,
            "device": self._host.device,
            "compute_capability": self._host.compute_capability,
            "driver": self._host.driver,
            "cuda": self._host.cuda,
            "remark": self._metadata.remark(self._host),
            "contexts": len(self._contexts),
            "cuda_graphs": {
                "used": self._no_graphs is None,
                "why_not": self._no_graphs,
                "batches": sorted(batches),
                "not_captured": {str(batch): why for batch, why in sorted(enqueued.items())},
            },
        }

    def close(self) -> None:
        """Wait for calls in progress, then free everything. A second call does nothing."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            atexit.unregister(self._at_exit)
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._idle) == len(self._contexts))
        # On a GPU that failed, freeing fails too, and there is nothing left to be freed.
        with suppress(EngineError) if self._broken else nullcontext(), self._cuda.current():
            self._free()

    def _free(self) -> None:
        with ExitStack() as steps:  # they go backwards, each even if one before it failed
            for context in self._contexts:
                steps.callback(context.free)
            steps.callback(self._plan.free)
            for context in self._contexts:
                steps.callback(context.release)

    @contextmanager
    def _context(self) -> Iterator[ExecutionContext]:
        """An execution context for this thread alone, with the GPU's context current."""
        with self._cuda.current():
            with self._changed:
                self._changed.wait_for(lambda: self._idle or self._closing or self._broken)
                if self._closing:
                    raise EngineError(f"{self._name}: the engine was closed")
                if self._broken is not None:
                    raise EngineError(self._broken)
                context = self._idle.pop()
            try:
                yield context
            except BrokenError as error:
                self._broken = str(error)
                raise
            finally:
                with self._changed:
                    self._idle.append(context)
                    self._changed.notify_all()

    def __enter__(self) -> TrtEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_living(engine: weakref.ref[TrtEngine]) -> None:
    if (living := engine()) is not None:
        living.close()
