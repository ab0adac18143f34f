"""`python mlserver_server.py MODEL PORT`: MLServer, pixels as base64 in the protocol's JSON.

MLServer's REST server does not support binary tensors.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import numpy as np
from _session import BATCH, infer, open_session
from mlserver import MLModel, MLServer, ModelSettings, Settings  # type: ignore[import-not-found]
from mlserver.codecs import Base64Codec, NumpyCodec  # type: ignore[import-not-found]
from mlserver.types import InferenceResponse  # type: ignore[import-not-found]

MODEL, PORT = sys.argv[1:]


class Network(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        self.session = open_session(MODEL)
        _, *self.shape = self.session.get_inputs()[0].shape
        return True

    async def predict(self, payload: Any) -> Any:
        pixels = b"".join(Base64Codec.decode_input(payload.inputs[0]))
        images = np.frombuffer(pixels, dtype=np.uint8).reshape(-1, *self.shape)
        # In the event loop and not on a thread, like its own runtimes, which is a little faster.
        logits = NumpyCodec.encode_output("logits", infer(self.session, images))
        return InferenceResponse(model_name=self.name, outputs=[logits])


settings = Settings(
    debug=False,
    host="127.0.0.1",
    http_port=int(PORT),
    grpc_port=0,
    metrics_endpoint=None,
    parallel_workers=0,
    gzip_enabled=False,
)
network = ModelSettings(
    name="network", implementation=Network, max_batch_size=BATCH, max_batch_time=0.001
)
asyncio.run(MLServer(settings).start([network]))
