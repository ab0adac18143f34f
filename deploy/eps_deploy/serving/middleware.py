"""What happens around every HTTP request: errors as JSON, and what `envelope` has.

A plain ASGI application, so that it costs microseconds.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import datetime, timezone
from typing import Any

from starlette.exceptions import HTTPException

from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.protocol import ApiError, InferenceFailed, as_refusal

# -- Logs: one JSON object a line, or plain text for a person at a terminal

NAME = "eps_serve"
logger = logging.getLogger(NAME)


class _Json(logging.Formatter):
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


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{key}={value}" for key, value in getattr(record, "facts", {}).items())
        text = f"{record.getMessage()} {facts}".rstrip()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def set_up() -> None:
    """Send what the server, uvicorn and grpcio have to say to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Text() if sys.stderr.isatty() else _Json())
    levels = {
        NAME: logging.INFO,
        "uvicorn.error": logging.ERROR,
        "grpc": logging.CRITICAL,  # what it logs as errors, any client can cause
    }
    for name, level in levels.items():
        found = logging.getLogger(name)
        found.handlers, found.propagate = [handler], False
        found.setLevel(level)


def say(message: str, **facts: Any) -> None:
    logger.info(message, extra={"facts": facts})


# -- What is around every request, on either wire: token, identifiers, counting, logging

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

Marks = list[tuple[bytes, bytes]]


def check_token(token: bytes, authorization: bytes) -> None:
    """Raise Refusal (401) unless a header Authorization has this value: `Bearer TOKEN`."""
    scheme, _, given = authorization.partition(b" ")
    # compare_digest first and always: the time shall not tell how much of it was right.
    right = hmac.compare_digest(given.strip(), token)
    if not right or scheme.lower() != b"bearer":
        raise ApiError(
            "this server wants a token: send the header Authorization: Bearer TOKEN",
            status=401,
            reason="token",
            headers=((b"www-authenticate", b"Bearer"),),
        )


def identify(request_id: bytes, trace: bytes) -> Marks:
    """Headers by which a request is known, for its answer and the log.

    Args:
        request_id: the header X-Request-ID; a new one in its place where it is none.
        trace: the header traceparent (W3C Trace Context, 3.2); left out where it is none.
    """
    known = _REQUEST_ID.fullmatch(request_id)
    marks = [(b"x-request-id", request_id if known else secrets.token_hex(8).encode())]
    if _TRACEPARENT.fullmatch(trace):
        marks.append((b"traceparent", trace))
    return marks


class Account:
    """What is counted and logged of requests.

    Args:
        metrics: count.
        log_requests: log every request, not only those that went wrong here.
    """

    def __init__(self, metrics: Metrics, *, log_requests: bool) -> None:
        self._metrics = metrics
        self._log_requests = log_requests

    def close(
        self,
        endpoint: str,
        code: int | str,
        *,
        began: float,
        reason: str,
        failed: bool,
        marks: Marks,
        **facts: Any,
    ) -> None:
        """A request has its answer.

        Args:
            endpoint, code: for metrics.
            began: `time.perf_counter` when it came.
            reason: why it was refused; "": it was not.
            failed: the fault was not the client's, and it is no overload, which shall not fill a
                disk as well.
            marks: see :func:`identify`.
            **facts: for the log, before what is logged of every request.
        """
        seconds = time.perf_counter() - began
        self._metrics.answered(endpoint, code)
        if reason:
            self._metrics.refuse(reason, seconds)
        if not self._log_requests and not failed:
            return
        facts |= {"status": code, "ms": round(1e3 * seconds, 3)}
        facts |= {name.decode().replace("-", "_"): value.decode() for name, value in marks}
        if reason:
            facts["reason"] = reason
        logger.info("request", extra={"facts": facts})


def log_mistake(marks: Marks) -> None:
    """Log the exception that is being handled, which must not happen, with the request's name."""
    facts = {"request_id": marks[0][1].decode()}
    logger.exception("a request failed, which must not happen", extra={"facts": facts})


Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/favicon.ico", "/v2/health/live", "/v2/health/ready")  # need no token, hold no data
GONE = "eps.gone"  # in the scope: what is to be called when the client goes away
ENDPOINT = "eps.endpoint"  # in the scope: the name that metrics have for the route


class Frame:
    """Around `inner`.

    Args:
        inner: answers, or raises Refusal, InferenceFailed or Starlette's HTTPException.
        metrics: counts what was answered.
        token: that clients must send as `Authorization: Bearer TOKEN`; None: they need none.
        log_requests: log every request, not only those that went wrong here.
    """

    def __init__(
        self, inner: Application, metrics: Metrics, *, token: bytes | None, log_requests: bool
    ) -> None:
        self._inner = inner
        self._token = token
        self._account = Account(metrics, log_requests=log_requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began = time.perf_counter()
        headers = dict(scope["headers"])
        marks = identify(headers.get(b"x-request-id", b""), headers.get(b"traceparent", b""))
        status = 0

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *marks]
            await send(message)

        reason = ""
        try:
            if self._token is not None and scope["path"] not in OPEN:
                check_token(self._token, headers.get(b"authorization", b""))
            await self._inner(scope, receive, marked)
        except (ApiError, HTTPException, InferenceFailed) as error:
            refusal = _as_refusal(error)
            reason = refusal.reason
            if not status:
                await _send_refusal(refusal, marked)
        except Exception:
            reason = "internal"
            log_mistake(marks)
            if not status:
                await _send_refusal(ApiError("internal error", status=500, reason=reason), marked)
        self._account.close(
            scope.get(ENDPOINT, "none"),
            status,
            began=began,
            reason=reason,
            failed=status >= 500 and status != 503,
            marks=marks,
            method=scope["method"],
            path=scope["path"],
        )


def _as_refusal(error: ApiError | HTTPException | InferenceFailed) -> ApiError:
    if not isinstance(error, HTTPException):
        return as_refusal(error)
    headers = tuple(
        (name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()
    )
    return ApiError(str(error.detail), status=error.status_code, reason="unknown", headers=headers)


async def _send_refusal(refusal: ApiError, send: Send) -> None:
    headers = list(refusal.headers)
    if refusal.retry_after is not None:
        headers.append((b"retry-after", str(refusal.retry_after).encode()))
    await send_json({"error": str(refusal)}, send, status=refusal.status, headers=headers)


async def send_json(
    value: Any,
    send: Send,
    *,
    status: int = 200,
    headers: list[tuple[bytes, bytes]] | None = None,
) -> None:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    await send_bytes(text, b"application/json", send, status=status, headers=headers)


async def send_bytes(
    body: bytes,
    kind: bytes,
    send: Send,
    *,
    status: int = 200,
    headers: list[tuple[bytes, bytes]] | None = None,
) -> None:
    every = [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"x-content-type-options", b"nosniff"),
        *(headers or ()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": every})
    await send({"type": "http.response.body", "body": body, "more_body": False})
