"""`python pytriton_server.py MODEL PORT`: PyTriton, its model in this process."""

from __future__ import annotations

import signal
import sys
from typing import Any

import numpy as np
from _session import BATCH, infer, open_session
from pytriton.decorators import batch  # type: ignore[import-not-found]
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor  # type: ignore[import-not-found]
from pytriton.triton import Triton, TritonConfig  # type: ignore[import-not-found]

model, port = sys.argv[1:]
session = open_session(model)
_, *shape = session.get_inputs()[0].shape
classes = session.get_outputs()[0].shape[1]


@batch  # type: ignore[untyped-decorator]
def run(images: Any) -> dict[str, Any]:
    return {"logits": infer(session, images)}


# It only cleans up after Ctrl-C; otherwise its shared memory remains.
signal.signal(signal.SIGTERM, signal.default_int_handler)
config = TritonConfig(
    http_address="127.0.0.1", http_port=int(port), allow_grpc=False, allow_metrics=False
)
with Triton(config=config) as triton:
    triton.bind(
        model_name="network",
        infer_func=run,
        inputs=[Tensor(name="images", dtype=np.uint8, shape=tuple(shape))],
        outputs=[Tensor(name="logits", dtype=np.float32, shape=(classes,))],
        config=ModelConfig(max_batch_size=BATCH, batcher=DynamicBatcher()),
    )
    triton.serve()
