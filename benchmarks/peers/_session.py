"""The network in ONNX Runtime, with the settings of `eps-serve`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

BATCH = 16


def open_session(path: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def infer(session: Any, images: Any) -> Any:
    """Logits float32 `[N, classes]` of images uint8 `[N, C, H, W]`."""
    return session.run(["logits"], {"images": np.ascontiguousarray(images)})[0]
