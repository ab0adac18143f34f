"""The TensorRT engine: runs a plan on the GPU that it was built for."""

from __future__ import annotations

import atexit
import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from eps_deploy.engines.base import (
    INPUT_NAME,
    OUTPUT_NAME,
    EngineError,
    Images,
    Logits,
    check_images,
)
from eps_deploy.engines.trt.cuda import Cuda, CudaGraphError, Event, Graph, capture, host_facts
from eps_deploy.engines.trt.plan import (
    PLAN,
    Messages,
    PlanMetadata,
    collect_messages,
    load_tensorrt,
    logger_of,
)

# -- A plan in the GPU's memory

_PORTS = [(INPUT_NAME, "INPUT", "UINT8"), (OUTPUT_NAME, "OUTPUT", "FLOAT")]
_PROFILE = 0  # the only one that eps-deploy builds


class LoadedPlan:
    """A deserialized plan; everything about it must run inside `cuda.current()`.

    A plan is executable code: the caller has checked its metadata before.

    Attributes:
        trt: the package.
        name: name of the plan in error messages.
        input_shape: `[C, H, W]` of one image.
        classes: number of logits.
        profile: smallest, optimal and largest batch.
        scratch: bytes of GPU memory that an inference needs besides its input and output.

    Args:
        plan: the bytes.
        host_code: whether the plan may contain CPU code, as a version-compatible plan does.

    Raises:
        EngineError: TensorRT does not load it, or it is not a plan of eps-deploy.
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
        ports = range(self._engine.num_io_tensors)
        names = [self._engine.get_tensor_name(index) for index in ports]
        found = [
            (
                name,
                self._engine.get_tensor_mode(name).name,
                self._engine.get_tensor_dtype(name).name,
            )
            for name in names
        ]
        if found != _PORTS or self._engine.num_optimization_profiles != 1:
            raise EngineError(
                f"{self.name}: not a plan of eps-deploy (its inputs and outputs are {found}, with"
                f" {self._engine.num_optimization_profiles} profiles, not {_PORTS} with 1)"
            )
        shapes = self._engine.get_tensor_profile_shape(INPUT_NAME, _PROFILE)
        smallest, optimal, largest = (int(shape[0]) for shape in shapes)
        self.profile = (smallest, optimal, largest)
        batch, *image = tuple(self._engine.get_tensor_shape(INPUT_NAME))
        rows, *classes = tuple(self._engine.get_tensor_shape(OUTPUT_NAME))
        # TensorRT may fix the batch size when the profile allows only one.
        free = {-1, smallest} if smallest == largest else {-1}
        if not {batch, rows} <= free or len(image) != 3 or len(classes) != 1:
            raise EngineError(
                f"{self.name}: not a plan of eps-deploy (it takes {[batch, *image]} and gives"
                f" {[rows, *classes]})"
            )
        self.input_shape = (int(image[0]), int(image[1]), int(image[2]))
        self.classes = int(classes[0])
        self.scratch = int(self._engine.device_memory_size_v2)

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
# `IExecutionContext` of its own. They share their scratch memory: only one runs at a time.

MOST_GRAPHS = 32  # batch sizes with a graph; a context and a graph take memory


class BrokenError(EngineError):
    """The GPU failed, and this process cannot use it any more."""


class _Pass(NamedTuple):
    """TensorRT's context for one batch size, and its graph if it could be captured."""

    context: Any
    graph: Graph | None


class _Resource(Protocol):
    def free(self) -> None: ...


_R = TypeVar("_R", bound=_Resource)


class ExecutionContext:
    """Runs a plan for one caller at a time; everything must run inside `cuda.current()`.

    Attributes:
        graphs: batch sizes that run as a CUDA graph.
        enqueued: batch sizes whose graph could not be captured, each with the reason.

    Args:
        plan: the network.
        cuda: the GPU that it is loaded on.
        bindings: `cuda.bindings.driver`; None: run without graphs.

    Raises:
        EngineError: not enough memory.
    """

    def __init__(self, plan: LoadedPlan, cuda: Cuda, bindings: Any | None) -> None:
        self._plan, self._cuda, self._bindings = plan, cuda, bindings
        self.graphs: set[int] = set()
        self.enqueued: dict[int, str] = {}
        self._passes: dict[int, _Pass] = {}
        self._common: Any = None  # for the batch sizes without a context of their own
        self._spare: Any = None  # for the next batch size that gets one
        self._events: list[Event] = []
        images = (plan.profile[2], *plan.input_shape)
        logits = (plan.profile[2], plan.classes)
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
        batch = len(images)
        with self._settled(), collect_messages(self._plan.trt) as messages:
            self._send(images)
            self._enqueue(self._ready(batch, messages), messages)
            found = self._host_logits.array[:batch]
            self._cuda.copy_out(found, self._logits, self._stream)
            self._stream.synchronize()
            logits: Logits = found.copy()
            return logits

    def time_on_device(self, images: Images, runs: int) -> npt.NDArray[np.float64]:
        """As `TrtEngine.time_on_device`."""
        while len(self._events) < 2 * runs:
            self._events.append(_owned_by(self._owned, self._cuda.event()))
        begins, ends = self._events[:runs], self._events[runs : 2 * runs]
        with self._settled(), collect_messages(self._plan.trt) as messages:
            self._send(images)
            ready = self._ready(len(images), messages)
            # An untimed run goes first and keeps the GPU busy, so that no timed run includes the
            # latency of its launch.
            self._enqueue(ready, messages)
            for begin, end in zip(begins, ends, strict=True):
                begin.record(self._stream)
                self._enqueue(ready, messages)
                end.record(self._stream)
            self._stream.synchronize()
        return np.array([b.milliseconds_till(e) for b, e in zip(begins, ends, strict=True)])

    def release(self) -> None:
        """Wait for the GPU, then free graphs and contexts. Call it before the plan is freed."""
        with ExitStack() as steps:  # backwards, and each of them even if one before it fails
            steps.callback(self._drop_contexts)
            for own in self._passes.values():
                if own.graph is not None:
                    steps.callback(own.graph.free)
            steps.callback(self._stream.synchronize)

    def free(self) -> None:
        """Free memory and stream. Call it after the plan was freed."""
        self._owned.close()

    def _drop_contexts(self) -> None:
        self._passes.clear()
        self._common = self._spare = None

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

    def _send(self, images: Images) -> None:
        staged = self._host_images.array[: len(images)]
        np.copyto(staged, images, casting="no")
        self._cuda.copy_in(self._images, staged, self._stream)

    def _enqueue(self, ready: _Pass, messages: Messages) -> None:
        if ready.graph is not None:
            ready.graph.launch(self._stream.handle)
        else:
            done = ready.context.execute_async_v3(self._stream.handle)
            self._require(done, "queues no inference", messages)

    def _ready(self, batch: int, messages: Messages) -> _Pass:
        """A context with its shape and addresses set, and its graph if it could be captured."""
        own = self._passes.get(batch)
        if own is not None:
            return own
        if self._bindings is None or len(self._passes) >= MOST_GRAPHS:
            if self._common is None:
                self._common = self._new_context()
            self._set(self._common, batch, messages)
            return _Pass(self._common, None)
        # An attribute until it is ready: a traceback must not own a context.
        if self._spare is None:
            self._spare = self._new_context()
        self._set(self._spare, batch, messages)
        graph = self._capture(self._spare, batch, messages)
        own = self._passes[batch] = _Pass(self._spare, graph)
        self._spare = None
        return own

    def _capture(self, context: Any, batch: int, messages: Messages) -> Graph | None:
        """The graph of one inference, or None with the reason in `enqueued`."""
        self._enqueue(_Pass(context, None), messages)  # once: TensorRT allocates in the first run
        self._stream.synchronize()
        handle = self._stream.handle
        try:
            graph = capture(self._bindings, handle, partial(context.execute_async_v3, handle))
        except CudaGraphError as error:
            self.enqueued[batch] = str(error)
            return None
        self.graphs.add(batch)
        return graph

    def _new_context(self) -> Any:
        context = self._plan.create_context()
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        return context

    def _set(self, context: Any, batch: int, messages: Messages) -> None:
        shape = (batch, *self._plan.input_shape)
        accepted = context.set_input_shape(INPUT_NAME, shape)
        self._require(accepted, f"does not take images of the shape {list(shape)}", messages)
        unknown = context.infer_shapes()
        self._require(not unknown, f"does not know the shape of {unknown}", messages)
        found = tuple(context.get_tensor_shape(OUTPUT_NAME))
        right = found == (batch, self._plan.classes)
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
    inference are copied while another computes.

    After a failed call the engine stays usable, unless the error says otherwise.

    Args:
        plan: the bytes of `model.plan`.
        metadata: the content of `model.plan.json`.
        device: index of the GPU.
        name: name of the plan in error messages.
        contexts: number of inferences in flight; each takes GPU memory for its buffers.
        trt: the package to use; None: `tensorrt`.
        cuda: the GPU; None: that of `device`.
        use_graphs: whether to launch each batch size as a CUDA graph; `describe` tells whether
            that was possible.

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
            if self._plan.profile != metadata.profile or self._plan.profile[0] != 1:
                raise EngineError(
                    f"{name}: takes batches of {list(self._plan.profile)} (smallest, optimal,"
                    f" largest) where its metadata says {list(metadata.profile)}; rebuild it"
                    " with eps-deploy --engine trt"
                )
            for _ in range(contexts):
                context = ExecutionContext(self._plan, self._cuda, bindings)
                undo.callback(context.free)
                self._contexts.append(context)
            undo.pop_all()
        self._idle = [*self._contexts]
        # After the primary context's release was registered (see `cuda`), so before it at exit:
        # TensorRT's objects must not outlive the context. Weakly: this must not keep the engine.
        self._at_exit = partial(_close_living, weakref.ref(self))
        atexit.register(self._at_exit)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self._plan.input_shape

    @property
    def classes(self) -> int:
        return self._plan.classes

    @property
    def max_batch(self) -> int:
        return self._plan.profile[2]

    def infer(self, images: Images) -> Logits:
        """Logits float32 `[N, classes]` of images uint8 `[N, C, H, W]`, 1 <= N <= max_batch."""
        check_images(images, self.input_shape, self.max_batch)
        with self._context() as context:
            return context.infer(images)

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
        enqueued = {
            k: why for context in self._contexts for k, why in dict(context.enqueued).items()
        }
        return {
            "name": "trt",
            "runtime": "tensorrt",
            "version": str(self._trt.__version__),
            "provider": "TensorRT",
            "threads": 1,
            "max_batch": self.max_batch,
            "opt_batch": self._plan.profile[1],
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
