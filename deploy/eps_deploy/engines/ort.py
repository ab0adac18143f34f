"""ONNX Runtime as an engine."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime

from eps_deploy.engines.base import (
    INPUT_NAME,
    OUTPUT_NAME,
    EngineError,
    Images,
    Logits,
    check_images,
)

PROVIDER = "CPUExecutionProvider"
# A second thread bought nothing on deep, narrow networks, and threads that wait
# in a loop for one another cost far more than they bring on cores that others use too.
THREADS = 1
MAX_BATCH = 256  # the graph itself has no limit; this one bounds the memory of a request
_ERRORS_ONLY = 3  # severity below which ONNX Runtime stays silent


class OrtEngine:
    """An exported network on ONNX Runtime's CPU provider; an `Engine` (see `engines.base`).

    Args:
        model: the bytes of an ONNX file as `eps-deploy` exports it.
        threads: threads within one operator.
        name: what error messages call the model.

    Raises:
        EngineError: not such a model, or ONNX Runtime did not give the provider that was asked for.
    """

    def __init__(self, model: bytes, *, threads: int = THREADS, name: str = "model.onnx") -> None:
        self.threads = threads
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1  # a residual network is one chain: nothing to overlap
        options.log_severity_level = _ERRORS_ONLY
        try:
            session = onnxruntime.InferenceSession(model, options, providers=[PROVIDER])
        except Exception as error:  # the binding raises its own types, none of them public
            raise EngineError(f"{name}: ONNX Runtime cannot load it: {error}") from error
        granted = session.get_providers()
        if granted[:1] != [PROVIDER]:
            raise EngineError(f"{name}: ONNX Runtime runs it on {granted}, not on {PROVIDER}")
        self._session: Any = session
        self._name = name
        self._read_signature()

    def _read_signature(self) -> None:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        found = [(port.name, port.type) for port in (*inputs, *outputs)]
        wanted = [(INPUT_NAME, "tensor(uint8)"), (OUTPUT_NAME, "tensor(float)")]
        if found != wanted or len(inputs[0].shape) != 4 or len(outputs[0].shape) != 2:
            raise EngineError(
                f"{self._name}: not a network exported by eps-deploy (its inputs and outputs"
                f" are {found}, not {wanted})"
            )
        sizes: list[Any] = [*inputs[0].shape[1:], outputs[0].shape[1]]
        if not all(isinstance(size, int) for size in sizes):
            raise EngineError(f"{self._name}: image size and classes must be fixed, not {sizes}")
        channels, height, width, classes = (int(size) for size in sizes)
        self._input_shape, self._classes = (channels, height, width), classes

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self._input_shape

    @property
    def classes(self) -> int:
        return self._classes

    @property
    def max_batch(self) -> int:
        return MAX_BATCH

    def infer(self, images: Images) -> Logits:
        """Logits float32 `[N, classes]` of images uint8 `[N, C, H, W]`, 1 <= N <= max_batch."""
        check_images(images, self._input_shape, MAX_BATCH)
        if self._session is None:
            raise EngineError(f"{self._name}: the engine was closed")
        try:
            logits = self._session.run([OUTPUT_NAME], {INPUT_NAME: images})[0]
        except Exception as error:
            raise EngineError(f"{self._name}: ONNX Runtime failed: {error}") from error
        assert isinstance(logits, np.ndarray)
        assert logits.dtype == np.float32
        return logits

    def describe(self) -> dict[str, Any]:
        return {
            "name": "ort",
            "runtime": "onnxruntime",
            "version": onnxruntime.__version__,
            "provider": PROVIDER,
            "threads": self.threads,
            "max_batch": MAX_BATCH,
        }

    def __enter__(self) -> OrtEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session = None
