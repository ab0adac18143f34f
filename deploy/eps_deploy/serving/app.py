"""What is served under which path: KServe v2, pictures, figures, the page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from starlette.routing import Route, Router

from eps_core.errors import EpsError
from eps_deploy.cli.predict import best
from eps_deploy.engines.base import Images, Logits
from eps_deploy.serving import descriptions, openapi
from eps_deploy.serving.limits import Body, Limits, Memory
from eps_deploy.serving.metrics import CONTENT_TYPE, Metrics
from eps_deploy.serving.middleware import (
    ENDPOINT,
    GONE,
    Receive,
    Scope,
    Send,
    send_bytes,
    send_json,
)
from eps_deploy.serving.protocol import (
    JSON_LENGTH,
    ApiError,
    Parser,
    Request,
    Signature,
    busy,
    decode,
    mapping,
    not_found,
    parse_json,
    read_request,
    write_answer,
)
from eps_deploy.serving.service import Served, Service

# -- Answering with the network: infer requests of KServe v2, and pictures

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
            raise ApiError(f"{JSON_LENGTH} must be a number of bytes")
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
        raise ApiError("top must be a number of labels, at least 1")
    return int(given)


# -- The page at `/`: one file that loads nothing from anywhere but this server

_INLINE = re.compile(rb"<(style|script)>(.*?)</\1>", re.DOTALL)


@cache
def html() -> bytes:
    return files(__package__).joinpath("page.html").read_bytes()


@cache
def headers() -> list[tuple[bytes, bytes]]:
    """A content security policy that lets the page run its own script and style alone."""
    hashes: dict[bytes, bytes] = {}
    for kind, text in _INLINE.findall(html()):
        digest = base64.b64encode(hashlib.sha256(text).digest())
        hashes[kind] = b"'sha256-" + digest + b"'"
    policy = (
        b"default-src 'none'; connect-src 'self'; img-src blob: data:; base-uri 'none';"
        b" form-action 'none'; frame-ancestors 'none'; style-src %s; script-src %s"
    ) % (hashes[b"style"], hashes[b"script"])
    return [
        (b"content-security-policy", policy),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache"),
    ]


_SMALL = 64 << 10  # bytes of a body that says little

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


class _Endpoint:
    """An ASGI application; Starlette would take a plain function for one of requests."""

    def __init__(self, name: str, handler: Handler) -> None:
        self._name = name
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[ENDPOINT] = self._name
        await self._handler(scope, receive, send)


class Api:
    """The handlers.

    Args:
        service: what answers.
        metrics: counts.
        limits: see there.
        memory: counts the bodies that are held.
        allow_load: whether clients may have the bundle loaded again.
    """

    def __init__(
        self,
        service: Service,
        metrics: Metrics,
        *,
        limits: Limits,
        memory: Memory,
        allow_load: bool,
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._memory = memory
        self._allow_load = allow_load
        self._inference = Inference(service, metrics, limits=limits, memory=memory)

    def router(self) -> Handler:
        """An ASGI application; it raises what `Frame` makes answers of."""
        get, post = ("GET",), ("POST",)
        table: list[tuple[str, tuple[str, ...], str, Handler]] = [
            ("/v2/models/{model}/infer", post, "infer", self._inference.infer),
            ("/v2/models/{model}/versions/{version}/infer", post, "infer", self._inference.infer),
            ("/v1/classify", post, "classify", self._inference.classify),
            ("/v2/health/live", get, "live", self.live),
            ("/v2/health/ready", get, "ready", self.ready),
            ("/metrics", get, "metrics", self.metrics),
            ("/v2", get, "server", self.server),
            ("/v2/models/stats", get, "stats", self.stats),
            ("/v2/repository/index", post, "index", self.index),
            ("/v2/repository/models/{model}/load", post, "load", self.load),
            ("/v1/card", get, "card", self.card),
            ("/v1/figures", get, "figures", self.figures),
            ("/openapi.json", get, "openapi", self.openapi),
            ("/", get, "page", self.page),
            ("/favicon.ico", get, "icon", self.icon),
        ]
        for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            table += [
                (prefix, get, "model", self.model),
                (f"{prefix}/ready", get, "model-ready", self.model_ready),
                (f"{prefix}/config", get, "config", self.config),
                (f"{prefix}/stats", get, "stats", self.stats),
            ]
        router = Router(
            routes=[
                Route(path, _Endpoint(name, handler), methods=methods)
                for path, methods, name, handler in table
            ],
            redirect_slashes=False,
            default=_nothing_here,
        )

        async def routed(scope: Scope, receive: Receive, send: Send) -> None:
            scope["app"] = router  # then a wrong method is raised, not answered by Starlette
            await router(scope, receive, send)

        return routed

    async def live(self, scope: Scope, receive: Receive, send: Send) -> None:
        live = self._service.live
        await send_json({"live": live}, send, status=200 if live else 503)

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        ready = self._service.ready
        await send_json({"ready": ready}, send, status=200 if ready else 503)

    async def server(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(descriptions.server(self._allow_load), send)

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(descriptions.model(self._model(scope)), send)

    async def model_ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        name, ready = self._model(scope).signature.name, self._service.ready
        await send_json({"name": name, "ready": ready}, send, status=200 if ready else 503)

    async def config(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(descriptions.config(self._model(scope)), send)

    async def stats(self, scope: Scope, receive: Receive, send: Send) -> None:
        served = self._model(scope)
        await send_json(descriptions.statistics(served, self._metrics.totals), send)

    def _model(self, scope: Scope) -> Served:
        served = self._service.current
        check_model(scope, served.signature)
        return served

    async def index(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._parameters(scope, receive)
        await send_json(descriptions.index(self._service.name, self._service.ready), send)

    async def load(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The bundle's folder is read again: no client may name another one."""
        if not self._allow_load:
            raise ApiError(
                "loading is off; start the server with --allow-load",
                status=403,
                reason="not-allowed",
            )
        _refuse_other_sites(dict(scope["headers"]))
        check_model(scope, self._service.current.signature)
        if await self._parameters(scope, receive):
            raise ApiError("load takes no parameters: the server reads its own bundle again")
        try:
            await self._service.load()
        except ApiError:
            raise
        except (EpsError, OSError) as error:
            self._service.say(f"the bundle was not loaded: {error}")
            raise ApiError(
                "the bundle cannot be loaded, and the one before is served on; the server's log"
                " says why",
                reason="load-failed",
            ) from None
        await send_json({}, send)

    async def _parameters(self, scope: Scope, receive: Receive) -> Mapping[str, Any]:
        with Body(dict(scope["headers"]), receive, _SMALL, self._memory) as body:
            content = await body.read()
        given = parse_json(content).get("parameters") if content.strip() else None
        return mapping(given, "parameters")

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_bytes(self._metrics.exposition(), CONTENT_TYPE.encode(), send)

    async def card(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(self._service.current.model.card, send)

    async def figures(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json({"ready": self._service.ready, **self._metrics.figures()}, send)

    async def openapi(self, scope: Scope, receive: Receive, send: Send) -> None:
        signature = self._service.current.signature if self._service.ready else None
        await send_json(openapi.document(self._service.name, signature), send)

    async def page(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_bytes(html(), b"text/html; charset=utf-8", send, headers=headers())

    async def icon(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_bytes(b"", b"image/x-icon", send, status=204)


def _refuse_other_sites(headers: dict[bytes, bytes]) -> None:
    """Raise Refusal (403) for what any web page could have sent to this server from a browser.

    Without asking first, a browser sends no Authorization and no JSON for a page of another site;
    and what it sends for one has an Origin.
    """
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    by_browser = b"origin" in headers or b"sec-fetch-site" in headers
    asked_first = b"authorization" in headers or kind == b"application/json"
    if not asked_first and (kind or by_browser):
        raise ApiError(
            "send the header Content-Type: application/json, so that no web page can do this",
            status=403,
            reason="cross-site",
        )


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    raise not_found("no such path; GET /v2 says what this server is")
