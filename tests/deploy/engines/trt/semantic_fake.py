"""A TensorRT that computes: the contract fake's classes, with ONNX Runtime behind them.

Device memory is host memory (`fake_gpu`). A context reads its input and writes its output by
address, when its stream gets to it. What TensorRT refuses is refused: a shape outside the selected
profile, a profile that there is not, an address or memory that is missing, a plan that is none.
What TensorRT forbids is a `Violation`: to change a context while it has work to do, to let two
contexts work in the same memory at once, to change a context after it was recorded, to free an
engine before its contexts.

A plan is a line of JSON and an ONNX file.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnxruntime

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME
from tests.deploy.engines.trt.contract import Behaviour, FakeModule, Version, make_fake
from tests.deploy.engines.trt.fake_gpu import FakeGpu, Violation, Work

_MAGIC = b"FAKE PLAN "
Profiles = tuple[tuple[int, int, int], ...]
PROFILES: Profiles = ((1, 1, 1), (2, 4, 8))
MS_AN_IMAGE = 0.25  # of the GPU's time


def make_plan(
    model: bytes,
    *,
    profiles: Profiles = PROFILES,
    scratch: int = 1024,
    input_type: str = "UINT8",
) -> bytes:
    """The plan of an ONNX file as `eps-deploy` exports it."""
    head = {"profiles": profiles, "scratch": scratch, "type": input_type}
    return _MAGIC + json.dumps(head).encode() + b"\n" + model


@dataclass(eq=False)
class _Network:
    """What an engine is made of."""

    session: Any
    profiles: Profiles
    scratch: int
    types: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The batch is -1, but where the profiles have one size alone: TensorRT fixes it."""
        ports = (*self.session.get_inputs(), *self.session.get_outputs())
        sizes = {batch for profile in self.profiles for batch in profile}
        batch = sizes.pop() if len(sizes) == 1 else -1
        return {port.name: (batch, *port.shape[1:]) for port in ports}


@dataclass(eq=False)
class _State:
    """What a context has been told."""

    network: _Network
    profile: int = 0
    memory: tuple[int, int] | None = None
    shape: tuple[int, ...] | None = None
    addresses: dict[str, int] = field(default_factory=dict)
    pending: int = 0
    warm: bool = False  # it has run since it was told

    def snapshot(self) -> tuple[Any, ...]:
        return self.profile, self.shape, tuple(sorted(self.addresses.items())), self.memory


class FakeTensorRT:
    """The module (`module`) and what its calls do; `builder` adds what builds plans."""

    def __init__(
        self, gpu: FakeGpu, version: Version = "11.4", builder: Behaviour | None = None
    ) -> None:
        self.gpu = gpu
        behaviour = self._behaviour()
        for name, described in (builder or {}).items():
            behaviour[name] = {**described, **behaviour.get(name, {})}
        self.module: FakeModule = make_fake(version, behaviour)
        self._logger: Any = None

    def _behaviour(self) -> dict[str, dict[str, Any]]:
        def port(kind: str) -> Any:
            return lambda engine, name: getattr(self.module, kind)[self._port(engine, kind, name)]

        return {
            "Runtime": {
                "__init__": self._start,
                "deserialize_cuda_engine": self._deserialize,
            },
            "ICudaEngine": {
                "num_io_tensors": lambda engine: len(engine._network.shapes),
                "num_optimization_profiles": lambda engine: len(engine._network.profiles),
                "device_memory_size_v2": lambda engine: engine._network.scratch,
                "get_tensor_name": lambda engine, index: [*engine._network.shapes][index],
                "get_tensor_mode": port("TensorIOMode"),
                "get_tensor_dtype": port("DataType"),
                "get_tensor_shape": lambda engine, name: self._dims(engine._network.shapes[name]),
                "get_tensor_profile_shape": self._profile_shape,
                "create_execution_context": self._create_context,
            },
            "IExecutionContext": {
                "set_optimization_profile_async": self._set_profile,
                "set_device_memory": self._set_memory,
                "set_input_shape": self._set_shape,
                "infer_shapes": self._infer_shapes,
                "get_tensor_shape": self._tensor_shape,
                "set_tensor_address": self._set_address,
                "execute_async_v3": self._execute,
            },
            "Dims": {
                "__init__": lambda dims, shape=(): object.__setattr__(dims, "_sizes", [*shape]),
                "__len__": lambda dims: len(dims._sizes),
                "__getitem__": lambda dims, index: dims._sizes[index],
            },
        }

    def _dims(self, shape: tuple[int, ...]) -> Any:
        return self.module.Dims(shape)

    @staticmethod
    def _port(engine: Any, kind: str, name: str) -> str:
        if kind == "DataType":
            return str(engine._network.types[name])
        return "INPUT" if name == INPUT_NAME else "OUTPUT"

    def _say(self, text: str) -> None:
        self._logger.log(self.module.ILogger.Severity.ERROR, text)

    def _refused(self, name: str) -> bool:
        refused = self.gpu.refused(name)
        if refused:
            self._say(f"{name} was told to fail")
        return refused

    def _made(self, kind: str, **private: Any) -> Any:
        self.gpu.live[kind] += 1
        result = self.module.make(kind, **private)
        weakref.finalize(result, self._destroyed, kind)
        return result

    def _destroyed(self, kind: str) -> None:
        if not self.gpu.stack:
            self.gpu.leaks.append(f"{kind} destroyed where no context is current")
        if kind == "ICudaEngine" and self.gpu.live["IExecutionContext"]:
            others = self.gpu.live["ICudaEngine"] - 1
            if not others:
                self.gpu.leaks.append("an engine destroyed before its contexts")
        self.gpu.live[kind] -= 1
        self.gpu.order.append(kind)

    def _start(self, runtime: Any, logger: Any) -> None:
        self.gpu.require_context("Runtime")
        self._logger = logger
        self.gpu.live["Runtime"] += 1
        weakref.finalize(runtime, self._destroyed, "Runtime")

    def _deserialize(self, runtime: Any, plan: bytes) -> Any:
        self.gpu.require_context("deserialize_cuda_engine")
        if self._refused("deserialize_cuda_engine") or not plan.startswith(_MAGIC):
            self._say("Serialization assertion stdVersionRead == serializationVersion failed.")
            return None
        head, _, model = plan.removeprefix(_MAGIC).partition(b"\n")
        told = json.loads(head)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # as TensorRT rounds
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        types = {INPUT_NAME: told["type"], OUTPUT_NAME: "FLOAT"}
        profiles = tuple((low, best, high) for low, best, high in told["profiles"])
        network = _Network(session, profiles, told["scratch"], types)
        return self._made("ICudaEngine", _network=network, _runtime=runtime)

    def _profile_shape(self, engine: Any, name: str, index: int) -> list[Any]:
        _, *rest = engine._network.shapes[name]
        return [self._dims((batch, *rest)) for batch in engine._network.profiles[index]]

    def _create_context(self, engine: Any, strategy: Any) -> Any:
        self.gpu.require_context("create_execution_context")
        if self._refused("create_execution_context"):
            return None
        assert strategy is self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._made("IExecutionContext", _state=_State(engine._network))

    def _set_profile(self, context: Any, index: int, stream_handle: int) -> bool:
        state = _idle(context)
        queue = self.gpu.queue(stream_handle)
        if queue.recorded is not None:
            queue.spoilt = True
        if self._refused("set_optimization_profile_async"):
            return False
        if not 0 <= index < len(state.network.profiles):
            self._say(f"setOptimizationProfileAsync: there is no profile {index}")
            return False
        # The shapes are those of another profile, and have to be set again.
        state.profile, state.shape, state.warm = index, None, False
        return True

    def _set_memory(self, context: Any, memory: int, size: int) -> None:
        state = _idle(context)
        self.gpu.at(memory, size, "device")
        assert size >= state.network.scratch
        state.memory, state.warm = (memory, size), False

    def _set_shape(self, context: Any, name: str, shape: Any) -> bool:
        state = _idle(context)
        smallest, _, largest = state.network.profiles[state.profile]
        batch, *rest = tuple(shape)
        if self._refused("set_input_shape"):
            return False
        if not smallest <= batch <= largest or tuple(rest) != state.network.shapes[name][1:]:
            self._say(
                f"setInputShape: {list(shape)} is not in optimization profile {state.profile}"
            )
            return False
        state.shape, state.warm = tuple(shape), False
        return True

    def _infer_shapes(self, context: Any) -> list[str]:
        unknown = self._refused("infer_shapes") or context._state.shape is None
        return [INPUT_NAME] if unknown else []

    def _tensor_shape(self, context: Any, name: str) -> Any:
        shape = context._state.network.shapes[name]
        told = context._state.shape
        return self._dims(shape if told is None else (told[0], *shape[1:]))

    def _set_address(self, context: Any, name: str, memory: int) -> bool:
        state = _idle(context)
        if self._refused("set_tensor_address"):
            return False
        state.addresses[name], state.warm = int(memory), False
        return True

    def _execute(self, context: Any, stream_handle: int) -> bool:
        self.gpu.require_context("execute_async_v3")
        state: _State = context._state
        queue = self.gpu.queue(stream_handle)
        if self._refused("execute_async_v3"):
            return False
        if state.shape is None or len(state.addresses) < 2 or state.memory is None:
            self._say("enqueueV3: a shape, an address or the device memory is missing")
            return False
        for address in (state.memory[0], *state.addresses.values()):
            self.gpu.claim(address, stream_handle)
        if queue.recorded is not None and not state.warm:
            queue.spoilt = True  # what TensorRT puts off until the first run cannot be recorded
        told = state.snapshot()

        def start() -> Work:
            state.pending += 1
            return partial(self._run, state, told)

        queue.add(start)
        return True

    def _run(self, state: _State, told: tuple[Any, ...]) -> None:
        if state.snapshot() != told:
            raise Violation("a context was changed between its recording and its launch")
        assert state.shape is not None
        assert state.memory is not None
        images = self._tensor(state, INPUT_NAME, state.shape, np.uint8)
        outputs = (state.shape[0], *state.network.shapes[OUTPUT_NAME][1:])
        logits = self._tensor(state, OUTPUT_NAME, outputs, np.float32)
        self.gpu.at(*state.memory, "device")[:] = 0xFF  # whoever else works there sees it
        logits[:] = state.network.session.run([OUTPUT_NAME], {INPUT_NAME: images})[0]
        self.gpu.clock += MS_AN_IMAGE * state.shape[0]
        state.warm = True
        state.pending -= 1

    def _tensor(self, state: _State, name: str, shape: tuple[int, ...], kind: Any) -> Any:
        nbytes = int(np.prod(shape)) * np.dtype(kind).itemsize
        return self.gpu.at(state.addresses[name], nbytes, "device").view(kind).reshape(shape)


def _idle(context: Any) -> _State:
    state: _State = context._state
    if state.pending:
        raise Violation("a context is changed while it has work to do")
    return state
