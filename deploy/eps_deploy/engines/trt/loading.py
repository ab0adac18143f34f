"""A plan in the GPU's memory: loaded, and asked what it takes."""

from __future__ import annotations

import threading
from typing import Any

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, EngineError
from eps_deploy.engines.trt.logger import listening, logger_of

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
