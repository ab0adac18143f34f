"""The six calls of the protocol."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from eps_deploy.engines.base import Logits
from eps_deploy.serving import descriptions
from eps_deploy.serving.limits import Limits
from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.protocol import ApiError, Parser, Request, too_large
from eps_deploy.serving.rpc import messages
from eps_deploy.serving.rpc.arrivals import Arrivals
from eps_deploy.serving.rpc.wire import split
from eps_deploy.serving.service import Served, Service

_NUMBERS = ("beside raw_input_contents", "there")
_WORKERS = 2
_SMALL = 64 << 10  # bytes of a message that only names a model


class Calls:
    """What answers them; each gets grpcio's context.

    Args:
        service: what they ask.
        metrics: counts.
        limits: see there.
        arrivals: receives their messages.
    """

    def __init__(
        self, service: Service, metrics: Metrics, *, limits: Limits, arrivals: Arrivals
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._arrivals = arrivals
        workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="eps-rpc-parse")
        self._parser = Parser(workers, limits.json, _NUMBERS)

    # These three have nothing to read: their messages are empty.

    async def server_live(self, context: Any) -> bytes:
        return messages.live(self._service.live)

    async def server_ready(self, context: Any) -> bytes:
        return messages.ready(self._service.ready)

    async def server_metadata(self, context: Any) -> bytes:
        return messages.server_metadata(descriptions.rpc_server())

    async def model_ready(self, context: Any) -> bytes:
        """False, as Triton says, also of a model that is not there, or not yet."""
        name, version = await self._model(context)
        try:
            self._check(self._service.current, name, version)
        except ApiError:
            return messages.ready(False)
        return messages.ready(self._service.ready)

    async def model_metadata(self, context: Any) -> bytes:
        name, version = await self._model(context)
        served = self._service.current
        self._check(served, name, version)
        return messages.model_metadata(descriptions.model(served))

    async def _model(self, context: Any) -> tuple[str, str]:
        async with self._arrivals.message(context) as content:
            if len(content) > _SMALL:
                raise too_large(f"the message is larger than the {_SMALL} bytes that are accepted")
            return messages.read_model(content)

    def _check(self, served: Served, name: str, version: str) -> None:
        served.signature.check(name, version or served.signature.version)

    async def model_infer(self, context: Any) -> bytes:
        began = time.perf_counter()
        with self._service.current.used() as served:
            if self._service.room < 1:  # known before a byte of its message is received
                raise served.batcher.refusal()
            async with self._arrivals.message(context) as content:
                request = await self._parse(content, served)
                logits = await _run(served, request, context.time_remaining())
            answer = messages.write_infer(request, logits, served.signature)
        self._metrics.inferred(time.perf_counter() - began, len(logits))
        return answer

    async def _parse(self, content: bytes, served: Served) -> Request:
        rest, raw = split(content)
        work = partial(messages.read_infer, rest, raw, served.signature)
        return await self._parser.parse(len(rest), work)


async def _run(served: Served, request: Request, remaining: float | None) -> Logits:
    """The logits, within the request's own timeout and the client's deadline.

    When the client goes away grpcio cancels this, and the images leave the queue.
    """
    timeouts = [seconds for seconds in (request.timeout, remaining) if seconds is not None]
    job = served.batcher.submit(request.images)
    return await served.batcher.infer(job, min(timeouts, default=None))
