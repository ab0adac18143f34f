"""An ONNX Runtime that says it runs on a GPU, and computes on the processor.

With CUDA graphs it holds its user to ONNX Runtime's rules: runs through bindings alone, tensors on
the GPU, one run at a time, a `gpu_graph_id` above 0. The first run with an id records its binding,
and later ones read and write the tensors of that binding, whatever is bound then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

GPU = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
_SWITCH = {"0", "1"}
# Of each provider's options those that are meant; ONNX Runtime has dozens of them.
_COMMON = {"use_tf32": _SWITCH, "cudnn_conv_algo_search": {"HEURISTIC"}}
_CUDA = {**_COMMON, "prefer_nhwc": _SWITCH, "enable_cuda_graph": _SWITCH}
_Real = onnxruntime.InferenceSession
_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}


class Broken(AssertionError):
    """Something that ONNX Runtime would have answered with wrong numbers, or a crash."""


class FakeOrtValue:
    """A tensor on the GPU: its content is reached through copies alone."""

    def __init__(self, content: npt.NDArray[Any]) -> None:
        self.content = content

    @classmethod
    def ortvalue_from_shape_and_type(
        cls, shape: Sequence[int], element_type: Any, device_type: str = "cpu", device_id: int = 0
    ) -> FakeOrtValue:
        if (device_type, device_id) != ("cuda", 0):
            raise Broken(f"a tensor on {device_type} {device_id}")
        content = np.full(shape, 255, np.uint8).astype(element_type)
        if content.dtype.kind == "f":
            content[:] = np.nan
        return cls(content)

    def update_inplace(self, data: npt.NDArray[Any]) -> None:
        if (data.shape, data.dtype) != (self.content.shape, self.content.dtype):
            raise ValueError("The input size of numpy array does not match the ort value")
        if not data.flags.c_contiguous:
            raise Broken("ONNX Runtime copies the memory below an array, whatever its strides")
        self.content[:] = data

    def numpy(self) -> npt.NDArray[Any]:
        return self.content.copy()


class FakeBinding:
    def __init__(self, session: FakeSession) -> None:
        self.session = session
        self.inputs: dict[str, FakeOrtValue] = {}
        self.outputs: dict[str, FakeOrtValue] = {}

    def bind_ortvalue_input(self, name: str, ortvalue: FakeOrtValue) -> None:
        self.inputs[name] = _checked(name, ortvalue, self.session.get_inputs())

    def bind_ortvalue_output(self, name: str, ortvalue: FakeOrtValue) -> None:
        self.outputs[name] = _checked(name, ortvalue, self.session.get_outputs())


def _checked(name: str, value: FakeOrtValue, ports: Sequence[Any]) -> FakeOrtValue:
    port = next((port for port in ports if port.name == name), None)
    if port is None or _TYPES[port.type] != value.content.dtype:
        raise ValueError(f"{name}: no such port, or of another type")
    return value


class FakeSession:
    """A session of the real one's on the processor.

    Attributes:
        granted: the providers that it says it runs on; None: those that are asked for.
        providers: what was asked for last, with options.
        threads: of every session, by its first provider, in order.
        refuse_graphs: whether the network cannot be captured as a whole.
        fail_capture: captures that are yet to fail.
        captured: every `gpu_graph_id` that was captured, by any session.
        severities: what the process's own logger was set to, in order.
        during: called in each run.
    """

    granted: Sequence[str] | None = None
    providers: Sequence[tuple[str, dict[str, str]]] = ()
    threads: list[tuple[str, int]]
    refuse_graphs = False
    fail_capture = 0
    captured: list[int]
    severities: list[int]
    during: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, model: bytes, options: Any, **arguments: Any) -> None:
        assert arguments["enable_fallback"] == 0
        asked = arguments["providers"]
        known = {
            "TensorrtExecutionProvider": {},
            "CUDAExecutionProvider": _CUDA if asked[0][0] == GPU[1] else _COMMON,
            "CPUExecutionProvider": {},
        }
        for name, chosen in asked:
            assert chosen.keys() == known[name].keys(), (name, chosen)
            assert all(value in known[name][key] for key, value in chosen.items()), chosen
        if "TensorrtExecutionProvider" in dict(asked) and options.optimized_model_filepath:
            raise RuntimeError("Unable to serialize model as it contains compiled nodes.")
        self._graphs = dict(asked).get(GPU[1], {}).get("enable_cuda_graph") == "1"
        if self._graphs and self.refuse_graphs:
            raise RuntimeError(
                "This session cannot use the graph capture feature as requested by the user as all"
                " the graph nodes have not been partitioned to the CUDAExecutionProvider"
            )
        type(self).providers = asked
        self.threads.append((asked[0][0], options.intra_op_num_threads))
        self._running = threading.Lock()
        self._recorded: dict[int, FakeBinding] = {}
        self._real = _Real(model, options, providers=["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        return [name for name, _ in self.providers] if self.granted is None else [*self.granted]

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self)

    def run(self, outputs: Any, feed: Any, options: Any = None) -> Any:
        if self._graphs:
            raise Broken("tensors on the host, and a session that captures CUDA graphs")
        return self._real.run(outputs, feed, options)

    def run_with_iobinding(self, binding: FakeBinding, options: Any = None) -> None:
        if binding.session is not self:
            raise ValueError("IOBinding must be used with the session that created it.")
        if not self._running.acquire(blocking=False):
            raise Broken("two runs at once, and one of them may be captured")
        try:
            self.during()
            self._compute(self._binding_of(binding, options) if self._graphs else binding)
        finally:
            self._running.release()

    def _binding_of(self, binding: FakeBinding, options: Any) -> FakeBinding:
        """The binding that was recorded with this run's `gpu_graph_id`, or is now."""
        try:
            number = int(options.get_run_config_entry("gpu_graph_id"))
        except (AttributeError, RuntimeError):
            raise Broken("a run without gpu_graph_id: all sizes would be one graph") from None
        if number < 1:
            raise Broken(f"gpu_graph_id {number} has a meaning of its own")
        if number not in self._recorded:
            if type(self).fail_capture:
                type(self).fail_capture -= 1
                raise RuntimeError("CUDA failure 901:\noperation failed due to a previous error")
            self._recorded[number] = binding
            self.captured.append(number)
        return self._recorded[number]

    def _compute(self, binding: FakeBinding) -> None:
        feed = {name: value.content for name, value in binding.inputs.items()}
        found = self._real.run([*binding.outputs], feed)
        for value, content in zip(binding.outputs.values(), found, strict=True):
            if value.content.shape != content.shape:
                raise ValueError(f"the output has the shape {content.shape}")
            value.content[:] = content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
