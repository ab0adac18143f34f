"""`python litserve_server.py MODEL PORT`: LitServe, pixels and logits as raw bytes."""

import sys
from typing import Annotated, Any

import litserve  # type: ignore[import-not-found]
import numpy as np
from _session import BATCH, infer, open_session
from fastapi import Body, Response  # type: ignore[import-not-found]

MODEL, PORT = sys.argv[1:]
RAW = "application/octet-stream"


class Network(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.session = open_session(MODEL)
        _, *self.shape = self.session.get_inputs()[0].shape

    # FastAPI reads these annotations: raw request body, unmodified response.
    def decode_request(self, request: Annotated[bytes, Body(media_type=RAW)]) -> Any:
        return np.frombuffer(request, dtype=np.uint8).reshape(self.shape)

    def predict(self, images: Any) -> Any:
        return infer(self.session, images)

    def encode_response(self, output: Any) -> Response:
        return Response(output.tobytes(), media_type=RAW)


if __name__ == "__main__":
    server = litserve.LitServer(
        Network(max_batch_size=BATCH, batch_timeout=0),
        accelerator="cpu",
        workers_per_device=1,
        fast_queue=True,
    )
    server.run(
        host="127.0.0.1",
        port=int(PORT),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
