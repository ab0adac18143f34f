"""Routes and handlers of the HTTP server: KServe v2, image classification, metrics, the page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from msgspec import Struct
from starlette.datastructures import QueryParams
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from eps_core.errors import EpsError
from eps_deploy.cli.predict import best
from eps_deploy.engines.base import Images, Logits
from eps_deploy.report.schema import json_schema
from eps_deploy.serving.limits import Body, Limits, Memory
from eps_deploy.serving.metrics import CONTENT_TYPE, Metrics
from eps_deploy.serving.middleware import ENDPOINT, ON_DISCONNECT, send_bytes, send_json
from eps_deploy.serving.model import VERSION, Model
from eps_deploy.serving.protocol import (
    JSON_LENGTH,
    ApiError,
    Signature,
    busy,
    convert,
    decode_image,
    not_found,
    parse_json,
    parse_request,
    read_request,
    server_metadata,
    write_answer,
)
from eps_deploy.serving.service import ServedModel, Service

_EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "statistics")
_JSON_LENGTH = JSON_LENGTH.lower().encode()
_DECODER_THREADS = 2
_TOP = 5  # labels, unless the client asks for another number
_MAX_PARAMETERS = 64 << 10  # bytes of a body that holds only parameters


class RepositoryRequest(Struct):
    """Body of the model repository extension's requests."""

    parameters: dict[str, Any] | None = None


class Api:
    """The HTTP interface; with `allow_load`, clients may reload the bundle."""

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
        self._limits = limits
        self._memory = memory
        self._allow_load = allow_load
        self._workers = ThreadPoolExecutor(_DECODER_THREADS, thread_name_prefix="eps-decode")
        self._decoding = 0  # images that wait for a worker or are decoded by one

    def routes(self) -> list[tuple[str, str, str, ASGIApp]]:
        """Path, method, endpoint name and handler of each route."""
        service, metrics = self._service, self._metrics
        extensions = _EXTENSIONS if not self._allow_load else (*_EXTENSIONS, "model_repository")
        models = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
        config = _json(lambda scope: self._model(scope).config())
        stats = _json(lambda scope: metrics.statistics(self._model(scope).signature))
        # The paths of inference first: they are compared one after another, for every request.
        table: list[tuple[str, str, str, ASGIApp]] = [
            *((f"{prefix}/infer", "POST", "infer", self.infer) for prefix in models),
            ("/v1/classify", "POST", "classify", self.classify),
            ("/v2/health/live", "GET", "live", _probe(lambda _: {"live": service.live})),
            ("/v2/health/ready", "GET", "ready", _probe(lambda _: {"ready": service.ready})),
            ("/metrics", "GET", "metrics", self.metrics),
            ("/v2", "GET", "server", _json(lambda _: server_metadata(*extensions))),
            ("/v2/models/stats", "GET", "stats", stats),
            ("/v2/repository/index", "POST", "index", self.index),
            ("/v2/repository/models/{model}/load", "POST", "load", self.load),
            ("/v1/card", "GET", "card", _json(lambda _: service.current.model.card)),
            ("/v1/figures", "GET", "figures", _json(self._figures)),
            ("/openapi.json", "GET", "openapi", _json(self._openapi)),
            ("/", "GET", "page", self.page),
            ("/favicon.ico", "GET", "icon", self.icon),
        ]
        for prefix in models:
            table += [
                (prefix, "GET", "model", _json(lambda scope: self._model(scope).metadata())),
                (f"{prefix}/ready", "GET", "model-ready", _probe(self._model_ready)),
                (f"{prefix}/config", "GET", "config", config),
                (f"{prefix}/stats", "GET", "stats", stats),
            ]
        return table

    def router(self) -> ASGIApp:
        """Return the ASGI application; it raises the errors that `HttpMiddleware` answers."""
        router = Router(
            routes=[
                Route(path, _Endpoint(name, handler), methods=[method])
                for path, method, name, handler in self.routes()
            ],
            redirect_slashes=False,
            default=_no_such_path,
        )

        async def routed(scope: Scope, receive: Receive, send: Send) -> None:
            scope["app"] = router  # then a wrong method is raised, not answered by Starlette
            await router(scope, receive, send)

        return routed

    # -- Inference

    async def infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        headers = dict(scope["headers"])
        with self._service.current.used() as served, self._body(headers, receive) as body:
            check_model(scope, served)
            json_length = _json_length(headers)
            content = await body.read()
            size = len(content) if json_length is None else min(json_length, len(content))
            request = await parse_request(
                partial(read_request, content, json_length, served.signature),
                size,
                limit=self._limits.json,
                workers=self._workers,
                told=("of JSON", "as raw bytes after the JSON"),
            )
            logits = await _run(scope, served, request.images, request.timeout)
            answer, length = write_answer(request, logits, served.signature)
        if length is None:
            await send_bytes(answer, b"application/json", send)
        else:
            given = [(_JSON_LENGTH, str(length).encode())]
            await send_bytes(answer, b"application/octet-stream", send, headers=given)
        self._metrics.inferred(time.perf_counter() - began, len(logits))

    async def classify(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        top = _top(scope)
        headers = dict(scope["headers"])
        with self._service.current.used() as served, self._body(headers, receive) as body:
            image = await self._decode(await body.read(), served)
            logits = await _run(scope, served, image, None)
        answer = {
            "model_name": served.signature.name,
            "model_version": served.signature.version,
            "predictions": best(logits[0], served.signature.labels, top),
        }
        await send_json(answer, send)
        self._metrics.inferred(time.perf_counter() - began, 1)

    def _body(self, headers: dict[bytes, bytes], receive: Receive) -> Body:
        return Body(headers, receive, self._limits.body, self._memory, "--max-body")

    async def _decode(self, content: bytes, served: ServedModel) -> Images:
        if self._decoding >= served.batcher.queue.limit:
            raise busy("too many images are waiting to be decoded", reason="queue-full")
        self._decoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._workers,
                decode_image,
                content,
                served.model.bundle.preprocessing,
                self._limits.pixels,
            )
        finally:
            self._decoding -= 1

    # -- Health, metadata, metrics, the page and its data

    def _model_ready(self, scope: Scope) -> dict[str, Any]:
        return {"name": self._model(scope).signature.name, "ready": self._service.ready}

    def _model(self, scope: Scope) -> Model:
        served = self._service.current
        check_model(scope, served)
        return served.model

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_bytes(self._metrics.exposition(), CONTENT_TYPE.encode(), send)

    def _figures(self, scope: Scope) -> dict[str, Any]:
        return {"ready": self._service.ready, **self._metrics.figures()}

    def _openapi(self, scope: Scope) -> dict[str, Any]:
        signature = self._service.current.signature if self._service.ready else None
        return openapi(self._service.name, signature)

    async def page(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_bytes(html(), b"text/html; charset=utf-8", send, headers=page_headers())

    async def icon(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_bytes(b"", b"image/x-icon", send, status=204)

    # -- Model repository

    async def index(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._parameters(scope, receive)
        state = "READY" if self._service.ready else "UNAVAILABLE"
        entry = {"name": self._service.name, "version": VERSION, "state": state, "reason": ""}
        await send_json([entry], send)

    async def load(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reload the bundle's folder; a client cannot name another one."""
        if not self._allow_load:
            raise ApiError(
                "loading is off; start the server with --allow-load",
                status=403,
                reason="not-allowed",
            )
        _reject_cross_site(dict(scope["headers"]))
        check_model(scope, self._service.current)
        if await self._parameters(scope, receive):
            raise ApiError("load takes no parameters: the server reads its own bundle again")
        try:
            await self._service.load()
        except ApiError:
            raise
        except (EpsError, OSError) as error:
            self._service.log(f"the bundle was not loaded: {error}")
            raise ApiError(
                "the bundle cannot be loaded, and the one before is served on; the server's log"
                " says why",
                reason="load-failed",
            ) from None
        await send_json({}, send)

    async def _parameters(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        """The parameters that are not null."""
        headers = dict(scope["headers"])
        with Body(headers, receive, _MAX_PARAMETERS, self._memory) as body:
            content = await body.read()
            document = parse_json(content) if content.strip() else {}
        given = convert(document, RepositoryRequest).parameters or {}
        return {name: value for name, value in given.items() if value is not None}


def _json(read: Callable[[Scope], Any]) -> ASGIApp:
    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(read(scope), send)

    return handler


def _probe(read: Callable[[Scope], dict[str, Any]]) -> ASGIApp:
    """Answer with status 503 when what is asked about is False."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        answer = read(scope)
        await send_json(answer, send, status=503 if False in answer.values() else 200)

    return handler


@dataclass(frozen=True)
class _Endpoint:
    """An ASGI application; Starlette would call a plain function with a request object."""

    name: str
    handler: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[ENDPOINT] = self.name
        await self.handler(scope, receive, send)


def check_model(scope: Scope, served: ServedModel) -> None:
    """Raise ApiError (404) when the path names another model or version."""
    model, given = served.signature, scope.get("path_params", {})
    model.check(given.get("model", model.name), given.get("version", model.version))


async def _run(scope: Scope, served: ServedModel, images: Images, timeout: float | None) -> Logits:
    """The logits; when the client goes away, its images leave the queue."""
    job = served.batcher.submit(images)
    scope[ON_DISCONNECT] = partial(served.batcher.cancel, job)
    try:
        return await served.batcher.infer(job, timeout)
    finally:
        del scope[ON_DISCONNECT]


def _json_length(headers: dict[bytes, bytes]) -> int | None:
    given = headers.get(_JSON_LENGTH)
    if given is None:
        return None
    if not given.isdigit() or len(given) > 12:
        raise ApiError(f"{JSON_LENGTH} must be a number of bytes")
    return int(given)


def _top(scope: Scope) -> int:
    given = QueryParams(scope["query_string"]).get("top", str(_TOP))
    if not (given.isascii() and given.isdigit()) or len(given) > 6 or int(given) < 1:
        raise ApiError("top must be a number of labels, at least 1")
    return int(given)


def _reject_cross_site(headers: dict[bytes, bytes]) -> None:
    """Raise ApiError (403) for a request that any web page could make a browser send.

    Without a preflight request, a browser sends no Authorization and no JSON for a page of another
    site; and what it sends for one has an Origin.
    """
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    by_browser = b"origin" in headers or b"sec-fetch-site" in headers
    preflighted = b"authorization" in headers or kind == b"application/json"
    if not preflighted and (kind or by_browser):
        raise ApiError(
            "send the header Content-Type: application/json, so that no web page can do this",
            status=403,
            reason="cross-site",
        )


async def _no_such_path(scope: Scope, receive: Receive, send: Send) -> None:
    raise not_found("no such path; GET /v2 says what this server is")


# -- OpenAPI 3.1


@cache
def openapi(name: str, signature: Signature | None) -> dict[str, Any]:
    """Fill `openapi.json` in for the model `name`; before it is loaded, `signature` is None.

    There, `{model}` is the model's name and a string such as `"{pixels}"` a number. Of the schemas
    of an input only those that fit the model are left: before it is loaded, images may have any
    shape. The schemas that the model card shares with a bundle's report are those of `report.json`.
    """
    text = files(__package__).joinpath("openapi.json").read_text("utf-8")
    text = text.replace("{model}", name).replace("{package_version}", version("eps-resnet"))
    accepted = ["AnyImages"]
    if signature is not None:
        pixels, most = math.prod(signature.input_shape), signature.max_images
        numbers = dict(zip(("channels", "height", "width"), signature.input_shape, strict=True))
        numbers |= {"pixels": pixels, "min_pixels": 2 * pixels}
        numbers |= {"max_pixels": most * pixels, "max_images": most}
        for placeholder, value in numbers.items():
            text = text.replace(f'"{{{placeholder}}}"', str(value))
        accepted = ["OneImage", "SeveralImages"] if most > 1 else ["OneImage"]
    filled: dict[str, Any] = json.loads(text)
    schemas = filled["components"]["schemas"]
    for unused in {"AnyImages", "OneImage", "SeveralImages"}.difference(accepted):
        del schemas[unused]
    schemas["InferRequest"]["properties"]["inputs"]["items"] = {
        "anyOf": [{"$ref": f"#/components/schemas/{schema}"} for schema in accepted]
    }
    text = json.dumps(json_schema())
    report = json.loads(text.replace("#/$defs/", "#/components/schemas/"))
    schemas |= report["$defs"]
    card = schemas["Card"]
    card["properties"] |= {
        field: report["properties"][field]
        for field in card["required"]
        if field not in card["properties"]
    }
    return filled


# -- The page at `/`: one file that loads nothing but this server's data

_INLINE = re.compile(rb"<(style|script)>(.*?)</\1>", re.DOTALL)


@cache
def html() -> bytes:
    return files(__package__).joinpath("page.html").read_bytes()


@cache
def page_headers() -> list[tuple[bytes, bytes]]:
    """Headers of the page: its content security policy allows only its own script and style."""
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
