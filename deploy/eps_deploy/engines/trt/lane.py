"""One inference at a time: a stream, buffers, and a context and a CUDA graph a batch size.

The buffers are made once, for the largest batch. A graph fixes shape, addresses and context, and
TensorRT keeps state in a context while it is recorded; so each batch size has a context of its own,
and all contexts of a lane share the memory that they work in: only one of them runs at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, EngineError, Images, Logits
from eps_deploy.engines.trt.cuda import Cuda, Event
from eps_deploy.engines.trt.graphs import Graph, GraphError, capture
from eps_deploy.engines.trt.loading import LoadedPlan
from eps_deploy.engines.trt.logger import Log, listening

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


class Lane:
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
