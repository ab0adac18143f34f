"""An ONNX Runtime that says it runs on a GPU, and computes on the processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnxruntime

GPU = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
# Of each provider's options those that are meant; ONNX Runtime has dozens of them.
_OPTIONS: dict[str, dict[str, set[str]]] = {
    "TensorrtExecutionProvider": {},
    "CUDAExecutionProvider": {"use_tf32": {"0", "1"}, "cudnn_conv_algo_search": {"HEURISTIC"}},
    "CPUExecutionProvider": {},
}
_Real = onnxruntime.InferenceSession


class FakeSession:
    """A session of the real one's on the processor.

    Attributes:
        granted: the providers that it says it runs on; None: those that are asked for.
        providers: what was asked for last, with options.
        threads: of every session, by its first provider, in order.
    """

    granted: Sequence[str] | None = None
    providers: Sequence[tuple[str, dict[str, str]]] = ()
    threads: list[tuple[str, int]]

    def __init__(self, model: bytes, options: Any, **arguments: Any) -> None:
        assert arguments["enable_fallback"] == 0
        asked = arguments["providers"]
        for name, chosen in asked:
            assert chosen.keys() == _OPTIONS[name].keys(), (name, chosen)
            assert all(value in _OPTIONS[name][key] for key, value in chosen.items()), chosen
        if "TensorrtExecutionProvider" in dict(asked) and options.optimized_model_filepath:
            raise RuntimeError("Unable to serialize model as it contains compiled nodes.")
        type(self).providers = asked
        self.threads.append((asked[0][0], options.intra_op_num_threads))
        self._real = _Real(model, options, providers=["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        return [name for name, _ in self.providers] if self.granted is None else [*self.granted]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
