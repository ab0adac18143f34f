"""Answering with the network: infer requests of KServe v2, and pictures."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import parse_qs

from eps_deploy.engines.base import Images, Logits
from eps_deploy.predict_cli import best
from eps_deploy.serving.contract import Request, Signature
from eps_deploy.serving.frame import GONE, Receive, Scope, Send, send_bytes, send_json
from eps_deploy.serving.limits import Body, Limits, Memory
from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.parsing import Parser
from eps_deploy.serving.pictures import decode
from eps_deploy.serving.protocol import JSON_LENGTH, read_request, write_answer
from eps_deploy.serving.refusals import Refusal, busy
from eps_deploy.serving.service import Served, Service

_JSON_LENGTH = JSON_LENGTH.lower().encode()
_JSON = ("of JSON", "as raw bytes after the JSON")
_WORKERS = 2
_TOP = 5


class Inference:
    """The handlers.

    Args:
        service: what answers.
        metrics: counts.
        limits: see there.
        memory: counts the bodies that are held.
    """

    def __init__(
        self, service: Service, metrics: Metrics, *, limits: Limits, memory: Memory
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._limits = limits
        self._memory = memory
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="eps-decode")
        self._parser = Parser(self._workers, limits.json, _JSON)
        self._pictures = 0  # that wait for a worker or are with one

    async def infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        headers = dict(scope["headers"])
        with (
            self._service.current.used() as served,
            Body(headers, receive, self._limits.body, self._memory, "--max-body") as body,
        ):
            check_model(scope, served.signature)
            json_length = self._json_length(headers)
            content = await body.read()
            request = await self._parse(content, json_length, served.signature)
            logits = await _run(scope, served, request.images, request.timeout)
            answer, length = write_answer(request, logits, served.signature)
        if length is None:
            await send_bytes(answer, b"application/json", send)
        else:
            marks = [(_JSON_LENGTH, str(length).encode())]
            await send_bytes(answer, b"application/octet-stream", send, headers=marks)
        self._metrics.inferred(time.perf_counter() - began, len(logits))

    def _json_length(self, headers: dict[bytes, bytes]) -> int | None:
        given = headers.get(_JSON_LENGTH)
        if given is None:
            return None
        if not given.isdigit() or len(given) > 12:
            raise Refusal(f"{JSON_LENGTH} must be a number of bytes")
        return int(given)

    async def _parse(
        self, content: bytes, json_length: int | None, signature: Signature
    ) -> Request:
        size = len(content) if json_length is None else min(json_length, len(content))
        return await self._parser.parse(
            size, partial(read_request, content, json_length, signature)
        )

    async def classify(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        headers = dict(scope["headers"])
        top = _top(scope)
        with (
            self._service.current.used() as served,
            Body(headers, receive, self._limits.body, self._memory, "--max-body") as body,
        ):
            pixels = await self._decode(await body.read(), served)
            logits = await _run(scope, served, pixels, None)
        answer = {
            "model_name": served.signature.name,
            "model_version": served.signature.version,
            "predictions": best(logits[0], served.signature.labels, top),
        }
        await send_json(answer, send)
        self._metrics.inferred(time.perf_counter() - began, 1)

    async def _decode(self, content: bytes, served: Served) -> Images:
        if self._pictures >= served.batcher.queue.limit:
            raise busy("too many pictures are waiting to be decoded", reason="queue-full")
        self._pictures += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._workers,
                decode,
                content,
                served.model.bundle.preprocessing,
                self._limits.pixels,
            )
        finally:
            self._pictures -= 1


def check_model(scope: Scope, signature: Signature) -> None:
    asked = scope.get("path_params", {})
    signature.check(asked.get("model", signature.name), asked.get("version", signature.version))


async def _run(scope: Scope, served: Served, images: Images, timeout: float | None) -> Logits:
    """The logits; when the client goes away, its images leave the queue."""
    job = served.batcher.submit(images)
    scope[GONE] = partial(served.batcher.cancel, job)
    try:
        return await served.batcher.infer(job, timeout)
    finally:
        del scope[GONE]


def _top(scope: Scope) -> int:
    query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    given = query.get("top", [str(_TOP)])[-1]
    if not (given.isascii() and given.isdigit()) or len(given) > 6 or int(given) < 1:
        raise Refusal("top must be a number of labels, at least 1")
    return int(given)
