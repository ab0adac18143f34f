"""TensorRT as an engine: a plan that runs on the GPU it was built for."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from eps_deploy.engines.base import EngineError, Images, Logits, check_images
from eps_deploy.engines.trt.cuda import Cuda, host_facts
from eps_deploy.engines.trt.graphs import GraphError
from eps_deploy.engines.trt.lane import BrokenError, Lane
from eps_deploy.engines.trt.loading import LoadedPlan
from eps_deploy.engines.trt.module import load_tensorrt
from eps_deploy.engines.trt.sidecar import PLAN, Sidecar

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
        sidecar: Sidecar,
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
        self._lanes: list[Lane] = []
        self._idle: list[Lane] = []
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
    def _lane(self) -> Iterator[Lane]:
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

    def _take(self) -> Lane:
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

    def _add_lane(self) -> Lane:
        lane = Lane(self._plan, self._cuda, self._bindings)
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
