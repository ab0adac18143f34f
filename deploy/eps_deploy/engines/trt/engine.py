"""TensorRT as an engine: a plan that runs on the GPU it was built for."""

from __future__ import annotations

import atexit
import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
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
)
from eps_deploy.engines.trt.cuda import Cuda, Event, Graph, GraphError, capture, host_facts
from eps_deploy.engines.trt.plan import PLAN, Log, PlanMetadata, listening, load_tensorrt, logger_of

# -- A plan in the GPU's memory: loaded, and asked what it takes

_PORTS = [(INPUT_NAME, "INPUT", "UINT8"), (OUTPUT_NAME, "OUTPUT", "FLOAT")]
_PROFILE = 0  # the only one that eps-deploy builds


class LoadedPlan:
    """A deserialised plan; everything about it must run inside `cuda.current()`.

    A plan is executable code: whoever calls this has checked its sidecar before.

    Attributes:
        trt: the module.
        name: what error messages call the plan.
        input_shape: `[C, H, W]` of one image.
        classes: number of logits.
        profile: smallest, optimal and largest batch.
        scratch: bytes of GPU memory that an inference needs beside its input and output.

    Args:
        plan: the bytes.
        host_code: whether the plan may bring code for the processor, as a version-compatible does.

    Raises:
        EngineError: TensorRT does not load it, or it is not a network of ours.
    """

    def __init__(self, plan: bytes, *, trt: Any, name: str, host_code: bool) -> None:
        self.trt, self.name = trt, name
        self._creating = threading.Lock()
        self._runtime: Any = None
        self._engine: Any = None
        try:
            self._load(plan, host_code)
            self._read_signature()
        except BaseException:
            self.free()  # here, where the GPU is current, and not when the traceback is forgotten
            raise

    def _load(self, plan: bytes, host_code: bool) -> None:
        with listening(self.trt) as log:
            self._runtime = self.trt.Runtime(logger_of(self.trt))
            if host_code:
                self._runtime.engine_host_code_allowed = True
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                f"{self.name}: TensorRT does not load it: {log.why()};"
                " build it again on this machine"
            )

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
        # TensorRT may fix a size that the profile leaves no choice of.
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
        """A new `IExecutionContext` that is yet to be given memory; not for two threads at once."""
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._creating, listening(self.trt) as log:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(f"{self.name}: TensorRT makes no execution context: {log.why()}")
        return context

    def free(self) -> None:
        """Its contexts must be gone already."""
        self._engine = None  # first: the runtime made it
        self._runtime = None


# -- One inference at a time: a stream, buffers, and a context and a CUDA graph a batch size
#
# The buffers are made once, for the largest batch. A graph fixes shape, addresses and context, and
# TensorRT keeps state in a context while it is recorded; so each batch size has a context of its
# own, and all contexts of a lane share the memory that they work in: only one of them runs at a
# time.

MOST_GRAPHS = 32  # batch sizes that get a graph; a context and a graph take memory


class BrokenError(EngineError):
    """The GPU failed in a way that this process does not recover from."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """What runs one batch size: TensorRT's context and, where there could be one, its graph."""

    context: Any
    graph: Graph | None


class _Owned(Protocol):
    def free(self) -> None: ...


_Thing = TypeVar("_Thing", bound=_Owned)


class ExecutionContext:
    """Runs a plan for one caller at a time; everything must run inside `cuda.current()`.

    Attributes:
        graphs: batch sizes that run as a graph.
        enqueued: batch sizes that were to have a graph and have none, each with the reason.

    Args:
        plan: the network.
        cuda: the GPU that it is loaded on.
        bindings: `cuda.bindings.driver`; None: without graphs.

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
            self._stream = _kept(owned, cuda.stream())
            self._images = _kept(owned, cuda.allocate(math.prod(images)))
            self._logits = _kept(owned, cuda.allocate(math.prod(logits) * 4))
            self._scratch = _kept(owned, cuda.allocate(max(plan.scratch, 1)))
            self._host_images = _kept(owned, cuda.page_locked(images, np.uint8))
            self._host_logits = _kept(owned, cuda.page_locked(logits, np.float32))
            self._owned = owned.pop_all()

    def infer(self, images: Images) -> Logits:
        """As `Engine.infer`; the images were checked already."""
        batch = len(images)
        with self._settled(), listening(self._plan.trt) as log:
            self._send(images)
            self._enqueue(self._ready(batch, log), log)
            found = self._host_logits.array[:batch]
            self._cuda.copy_out(found, self._logits, self._stream)
            self._stream.synchronize()
            logits: Logits = found.copy()
            return logits

    def time_on_device(self, images: Images, runs: int) -> npt.NDArray[np.float64]:
        """Milliseconds of GPU time of each of `runs` runs, the images there already."""
        while len(self._events) < 2 * runs:
            self._events.append(_kept(self._owned, self._cuda.event()))
        begins, ends = self._events[:runs], self._events[runs : 2 * runs]
        with self._settled(), listening(self._plan.trt) as log:
            self._send(images)
            ready = self._ready(len(images), log)
            # One more goes first, so that the GPU is at work when the first one to be timed comes
            # up: none of them holds the time that a launch takes to get there.
            self._enqueue(ready, log)
            for begin, end in zip(begins, ends, strict=True):
                begin.record(self._stream)
                self._enqueue(ready, log)
                end.record(self._stream)
            self._stream.synchronize()
        return np.array([b.milliseconds_till(e) for b, e in zip(begins, ends, strict=True)])

    def release(self) -> None:
        """Wait for the GPU, then free graphs and contexts: before the plan is freed."""
        with ExitStack() as steps:  # backwards, and each of them even if one before it fails
            steps.callback(self._drop_contexts)
            for own in self._passes.values():
                if own.graph is not None:
                    steps.callback(own.graph.free)
            steps.callback(self._stream.synchronize)

    def free(self) -> None:
        """Free memory and stream: after the plan was freed."""
        self._owned.close()

    def _drop_contexts(self) -> None:
        self._passes.clear()
        self._common = self._spare = None

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """When the block fails, nothing of it is still at work in the buffers afterwards."""
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

    def _enqueue(self, ready: _Pass, log: Log) -> None:
        if ready.graph is not None:
            ready.graph.launch(self._stream.handle)
        else:
            done = ready.context.execute_async_v3(self._stream.handle)
            self._require(done, "queues no inference", log)

    def _ready(self, batch: int, log: Log) -> _Pass:
        """A context with its shape and addresses set, and its graph if there can be one."""
        own = self._passes.get(batch)
        if own is not None:
            return own
        if self._bindings is None or len(self._passes) >= MOST_GRAPHS:
            if self._common is None:
                self._common = self._new_context()
            self._set(self._common, batch, log)
            return _Pass(self._common, None)
        # Kept here until it is ready: an error's traceback must not be what owns a context.
        if self._spare is None:
            self._spare = self._new_context()
        self._set(self._spare, batch, log)
        own = self._passes[batch] = _Pass(self._spare, self._record(self._spare, batch, log))
        self._spare = None
        return own

    def _record(self, context: Any, batch: int, log: Log) -> Graph | None:
        """The graph of one inference, or None with the reason in `enqueued`."""
        self._enqueue(_Pass(context, None), log)  # once, for what TensorRT puts off until then
        self._stream.synchronize()
        handle = self._stream.handle
        try:
            graph = capture(self._bindings, handle, partial(context.execute_async_v3, handle))
        except GraphError as error:
            self.enqueued[batch] = str(error)
            return None
        self.graphs.add(batch)
        return graph

    def _new_context(self) -> Any:
        context = self._plan.create_context()
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        return context

    def _set(self, context: Any, batch: int, log: Log) -> None:
        shape = (batch, *self._plan.input_shape)
        accepted = context.set_input_shape(INPUT_NAME, shape)
        self._require(accepted, f"does not take images of the shape {list(shape)}", log)
        unknown = context.infer_shapes()
        self._require(not unknown, f"does not know the shape of {unknown}", log)
        found = tuple(context.get_tensor_shape(OUTPUT_NAME))
        right = found == (batch, self._plan.classes)
        self._require(right, f"gives logits of the shape {list(found)}", log)
        for name, memory in ((INPUT_NAME, self._images), (OUTPUT_NAME, self._logits)):
            taken = context.set_tensor_address(name, memory.address)
            self._require(taken, f"does not take the address of {name}", log)

    def _require(self, right: bool, failure: str, log: Log) -> None:
        if not right:
            raise EngineError(f"{self._plan.name}: TensorRT {failure}: {log.why()}")


def _kept(owned: ExitStack, thing: _Thing) -> _Thing:
    owned.callback(thing.free)
    return thing


# While one inference computes, the next one's images are copied: that keeps a GPU busy. A lane more
# would only take more of its memory, so further threads wait their turn.
LANES = 2


class TrtEngine:
    """A plan of TensorRT on its GPU; an `Engine` (see `engines.base`).

    Any thread may call it. Two threads never share an execution context: each call takes one of
    at most two lanes, with a stream and buffers of its own, and waits while both are taken. (A lane
    for each thread would take as much GPU memory as a server has threads, and keep that of
    threads that are gone.) A lane's memory is freed by `close`, by whatever thread calls it.

    After a call that failed the engine can be used on, unless the error says otherwise.

    Args:
        plan: the bytes of `model.plan`.
        sidecar: what is known of it.
        device: index of the GPU.
        name: what error messages call the plan.
        trt: the module to use; None: `tensorrt`.
        cuda: the GPU; None: that of `device`.
        use_graphs: whether to launch each batch size as a CUDA graph; `describe` tells whether
            that was possible.

    Raises:
        EngineError: TensorRT, CUDA or the GPU is missing; the plan was built for another machine
            or is not the one that the sidecar describes; the GPU's memory is too small.
    """

    def __init__(
        self,
        plan: bytes,
        sidecar: PlanMetadata,
        *,
        device: int = 0,
        name: str = PLAN,
        trt: Any = None,
        cuda: Cuda | None = None,
        use_graphs: bool = True,
    ) -> None:
        self._trt: Any = load_tensorrt() if trt is None else trt
        self._cuda = Cuda(device) if cuda is None else cuda
        self._sidecar, self._name = sidecar, name
        self._host = host_facts(self._trt, self._cuda)
        sidecar.check(plan, self._host, name=name)
        self._bindings, self._no_graphs = _bindings(self._cuda, use_graphs)
        self._changed = threading.Condition()
        self._lanes: list[ExecutionContext] = []
        self._idle: list[ExecutionContext] = []
        self._closing = False
        self._broken: str | None = None
        self._one_lane: str | None = None  # why there is no second one
        self._load(plan)
        # After the primary context's release was registered (see `cuda`), so before it at exit:
        # TensorRT's objects must not outlive the context. Weakly: this must not keep the engine.
        self._at_exit = partial(_close_living, weakref.ref(self))
        atexit.register(self._at_exit)

    def _load(self, plan: bytes) -> None:
        with self._cuda.current(), ExitStack() as undo:
            self._plan = LoadedPlan(
                plan, trt=self._trt, name=self._name, host_code=self._sidecar.version_compatible
            )
            undo.callback(self._plan.free)
            if self._plan.profile != self._sidecar.profile or self._plan.profile[0] != 1:
                raise EngineError(
                    f"{self._name}: takes batches of {list(self._plan.profile)} (smallest, optimal,"
                    f" largest) where its sidecar says {list(self._sidecar.profile)}; rebuild it"
                    " with eps-deploy --engine trt"
                )
            self._add_lane()  # now, so that too little memory is found out at once
            self._idle = [*self._lanes]
            undo.pop_all()

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
        with self._lane() as lane:
            return lane.infer(images)

    def time_on_device(self, images: Images, runs: int) -> npt.NDArray[np.float64]:
        """Milliseconds of GPU time of each of `runs` inferences of the batch `images`, by events.

        The images are on the GPU before and the logits stay there: what is timed is the network.
        """
        check_images(images, self.input_shape, self.max_batch)
        with self._lane() as lane:
            return lane.time_on_device(images, runs)

    def describe(self) -> dict[str, Any]:
        with self._changed:
            batches = {batch for lane in self._lanes for batch in tuple(lane.graphs)}
            enqueued = {k: why for lane in self._lanes for k, why in dict(lane.enqueued).items()}
        return {
            "name": "trt",
            "runtime": "tensorrt",
            "version": str(self._trt.__version__),
            "provider": "TensorRT",
            "threads": 1,
            "max_batch": self.max_batch,
            "opt_batch": self._plan.profile[1],
            "precision": self._sidecar.precision,
            "device": self._host.device,
            "compute_capability": self._host.compute_capability,
            "driver": self._host.driver,
            "cuda": self._host.cuda,
            "remark": self._sidecar.remark(self._host),
            "lanes": {"made": len(self._lanes), "why_no_more": self._one_lane},
            "cuda_graphs": {
                "used": self._no_graphs is None,
                "why_not": self._no_graphs,
                "batches": sorted(batches),
                "not_captured": {str(batch): why for batch, why in sorted(enqueued.items())},
            },
        }

    def close(self) -> None:
        """Wait for the calls that are under way, then free everything. Again: does nothing."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            atexit.unregister(self._at_exit)
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._idle) == len(self._lanes))
        # On a GPU that failed, freeing fails too, and there is nothing left to be freed.
        with suppress(EngineError) if self._broken else nullcontext(), self._cuda.current():
            self._free()

    def _free(self) -> None:
        with ExitStack() as steps:  # they go backwards, each even if one before it failed
            for lane in self._lanes:
                steps.callback(lane.free)
            steps.callback(self._plan.free)
            for lane in self._lanes:
                steps.callback(lane.release)

    @contextmanager
    def _lane(self) -> Iterator[ExecutionContext]:
        """A lane that nobody else has during the block, with the GPU's context current."""
        with self._cuda.current():
            lane = self._take()
            try:
                yield lane
            except BrokenError as error:
                self._broken = str(error)
                raise
            finally:
                with self._changed:
                    self._idle.append(lane)
                    self._changed.notify_all()

    def _take(self) -> ExecutionContext:
        with self._changed:
            while True:
                if self._closing:
                    raise EngineError(f"{self._name}: the engine was closed")
                if self._broken is not None:
                    raise EngineError(self._broken)
                if self._idle:
                    return self._idle.pop()
                if len(self._lanes) < LANES and self._one_lane is None:
                    try:
                        return self._add_lane()
                    except EngineError as error:
                        self._one_lane = str(error)  # one is enough to go on
                self._changed.wait_for(lambda: self._idle or self._closing or self._broken)

    def _add_lane(self) -> ExecutionContext:
        lane = ExecutionContext(self._plan, self._cuda, self._bindings)
        self._lanes.append(lane)
        return lane

    def __enter__(self) -> TrtEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_living(engine: weakref.ref[TrtEngine]) -> None:
    if (living := engine()) is not None:
        living.close()


def _bindings(cuda: Cuda, use_graphs: bool) -> tuple[Any | None, str | None]:
    """What captures graphs, or None and why there will be none."""
    if not use_graphs:
        return None, "not asked for"
    try:
        return cuda.graph_bindings(), None
    except GraphError as error:
        return None, str(error)
