"""`MODEL=... bentoml serve bentoml_service:Network`: BentoML, pixels and logits as raw bytes.

It uses an ASGI application in the service, which computes in the event loop: this was fastest.
BentoML's own endpoints accept no raw bytes, and its batches cost more than they gain on a CPU.
"""

import os

import bentoml  # type: ignore[import-not-found]
import numpy as np
from _session import infer, open_session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

session = open_session(os.environ["MODEL"])
_, *shape = session.get_inputs()[0].shape


async def predict(request: Request) -> Response:
    images = np.frombuffer(await request.body(), dtype=np.uint8).reshape(-1, *shape)
    return Response(infer(session, images).tobytes(), media_type="application/octet-stream")


QUIET = {"access": {"enabled": False}}


@bentoml.service(workers=1, logging=QUIET, metrics={"enabled": False})
@bentoml.asgi_app(Starlette(routes=[Route("/", predict, methods=["POST"])]), path="/predict")
class Network:
    """All that it does is in `predict`."""
