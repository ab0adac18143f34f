"""HTTP middleware: authentication, trace headers, errors as JSON, access log, and the log itself.

A plain ASGI application, because it must cost microseconds. gRPC shares all but that.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import sys
import time
from datetime import datetime, timezone
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.protocol import ApiError

# -- Log: one JSON object a line, or plain text on a terminal

logger = logging.getLogger("eps_serve")


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc)
        entry: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{key}={value}" for key, value in getattr(record, "facts", {}).items())
        text = f"{record.getMessage()} {facts}".rstrip()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure_logging() -> None:
    """Send the log of the server, uvicorn and grpcio to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_TextFormatter() if sys.stderr.isatty() else _JsonFormatter())
    levels = {
        logger.name: logging.INFO,
        "uvicorn.error": logging.ERROR,
        "grpc": logging.CRITICAL,  # what it logs as errors, any client can cause
    }
    for name, level in levels.items():
        found = logging.getLogger(name)
        found.handlers, found.propagate = [handler], False
        found.setLevel(level)


def log(message: str, **facts: Any) -> None:
    logger.info(message, extra={"facts": facts})


# -- For HTTP and gRPC: token, trace headers, access log

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

HeaderList = list[tuple[bytes, bytes]]


def trace_headers(request_id: bytes, traceparent: bytes) -> HeaderList:
    """Headers that identify a request, for its answer and the log.

    Where the client's are not valid, there is a new X-Request-ID, and no traceparent (W3C Trace
    Context, 3.2).
    """
    valid = _REQUEST_ID.fullmatch(request_id)
    headers = [(b"x-request-id", request_id if valid else secrets.token_hex(8).encode())]
    if _TRACEPARENT.fullmatch(traceparent):
        headers.append((b"traceparent", traceparent))
    return headers


class Access:
    """Authentication, access log and request counts, for HTTP and gRPC.

    Without `log_requests`, only requests that failed because of this server are logged.
    """

    def __init__(self, metrics: Metrics, *, token: bytes | None, log_requests: bool) -> None:
        self._metrics = metrics
        self._token = token
        self._log_requests = log_requests

    def check_token(self, authorization: bytes) -> None:
        """Raise ApiError (401) unless a header Authorization has the value `Bearer TOKEN`."""
        if self._token is None:
            return
        scheme, _, given = authorization.partition(b" ")
        # compare_digest first and always: the time must not tell how much of it was right.
        right = hmac.compare_digest(given.strip(), self._token)
        if not right or scheme.lower() != b"bearer":
            raise ApiError(
                "this server wants a token: send the header Authorization: Bearer TOKEN",
                status=401,
                reason="token",
                headers=((b"www-authenticate", b"Bearer"),),
            )

    def record(
        self,
        endpoint: str,
        code: int | str,
        *,
        began: float,
        reason: str,
        failed: bool,
        trace: HeaderList,
        **facts: Any,
    ) -> None:
        """Count and log a request that has its answer.

        Args:
            began: `time.perf_counter` when it arrived.
            reason: of its API error; "": there was none.
            failed: whether the fault was the server's; not under overload, which must not fill a
                disk as well.
            **facts: for the log, before what is logged of every request.
        """
        seconds = time.perf_counter() - began
        self._metrics.answered(endpoint, code)
        if reason:
            self._metrics.failed(reason, seconds)
        if not self._log_requests and not failed:
            return
        facts |= {"status": code, "ms": round(1e3 * seconds, 3)}
        facts |= {name.decode().replace("-", "_"): value.decode() for name, value in trace}
        if reason:
            facts["reason"] = reason
        log("request", **facts)


def as_api_error(error: Exception, trace: HeaderList) -> ApiError:
    """The error to answer with; any that is not an ApiError is a bug of this server, and logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # of Starlette: another method than the path's
        given = (error.headers or {}).items()
        allow = tuple((name.lower().encode(), value.encode()) for name, value in given)
        return ApiError(error.detail, status=error.status_code, reason="unknown", headers=allow)
    facts = {"request_id": trace[0][1].decode()}
    logger.error("a request failed, which must not happen", exc_info=error, extra={"facts": facts})
    return ApiError("internal error", status=500, reason="internal")


# -- Middleware of HTTP

OPEN = ("/", "/favicon.ico", "/v2/health/live", "/v2/health/ready")  # need no token, hold no data
ON_DISCONNECT = "eps.on_disconnect"  # key of a scope: called when the client goes away
ENDPOINT = "eps.endpoint"  # key of a scope: name of the route, for metrics


class HttpMiddleware:
    """Wrap an ASGI application, which may raise ApiError or HTTPException."""

    def __init__(self, inner: ASGIApp, access: Access) -> None:
        self._inner = inner
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began = time.perf_counter()
        headers = dict(scope["headers"])
        trace = trace_headers(headers.get(b"x-request-id", b""), headers.get(b"traceparent", b""))
        status = 0

        async def send_traced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *trace]
            await send(message)

        error: ApiError | None = None
        try:
            if scope["path"] not in OPEN:
                self._access.check_token(headers.get(b"authorization", b""))
            await self._inner(scope, receive, send_traced)
        except Exception as raised:
            error = as_api_error(raised, trace)
        if error is not None and not status:
            answer = list(error.headers)
            if error.retry_after is not None:
                answer.append((b"retry-after", str(error.retry_after).encode()))
            body = {"error": str(error)}
            await send_json(body, send_traced, status=error.status, headers=answer)
        self._access.record(
            scope.get(ENDPOINT, "none"),
            status,
            began=began,
            reason=error.reason if error is not None else "",
            failed=status >= 500 and status != 503,
            trace=trace,
            method=scope["method"],
            path=scope["path"],
        )


async def send_json(
    value: Any, send: Send, *, status: int = 200, headers: HeaderList | None = None
) -> None:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    await send_bytes(text, b"application/json", send, status=status, headers=headers)


async def send_bytes(
    body: bytes,
    content_type: bytes,
    send: Send,
    *,
    status: int = 200,
    headers: HeaderList | None = None,
) -> None:
    every = [
        (b"content-type", content_type),
        (b"content-length", str(len(body)).encode()),
        (b"x-content-type-options", b"nosniff"),
        *(headers or ()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": every})
    await send({"type": "http.response.body", "body": body, "more_body": False})
