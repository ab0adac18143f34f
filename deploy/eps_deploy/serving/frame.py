"""What happens around every request: token, identifiers, errors as JSON, counting, logging.

A plain ASGI application, so that it costs microseconds.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from eps_deploy.serving.logs import logger
from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.refusals import InferenceFailed, Refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/favicon.ico", "/v2/health/live", "/v2/health/ready")  # need no token, hold no data
GONE = "eps.gone"  # in the scope: what is to be called when the client goes away
ENDPOINT = "eps.endpoint"  # in the scope: the name that metrics have for the route
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


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
        self._metrics = metrics
        self._token = token
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8).encode()
        marks = [(b"x-request-id", request_id)]
        trace = headers.get(b"traceparent", b"")
        if _TRACEPARENT.fullmatch(trace):
            marks.append((b"traceparent", trace))
        status = 0

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *marks]
            await send(message)

        reason = ""
        try:
            self._check_token(scope["path"], headers)
            await self._inner(scope, receive, marked)
        except (Refusal, HTTPException, InferenceFailed) as error:
            refusal = as_refusal(error)
            reason = refusal.reason
            if not status:
                await _send_refusal(refusal, marked)
        except Exception:
            reason = "internal"
            facts = {"request_id": request_id.decode()}
            logger.exception("a request failed, which must not happen", extra={"facts": facts})
            if not status:
                await _send_refusal(Refusal("internal error", status=500, reason=reason), marked)
        self._finish(scope, status, reason, began, marks)

    def _check_token(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._token is None or path in OPEN:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # compare_digest first and always: the time shall not tell how much of it was right.
        right = hmac.compare_digest(given.strip(), self._token)
        if not right or scheme.lower() != b"bearer":
            raise Refusal(
                "this server wants a token: send the header Authorization: Bearer TOKEN",
                status=401,
                reason="token",
                headers=((b"www-authenticate", b"Bearer"),),
            )

    def _finish(
        self,
        scope: Scope,
        status: int,
        reason: str,
        began: float,
        marks: list[tuple[bytes, bytes]],
    ) -> None:
        seconds = time.perf_counter() - began
        self._metrics.answered(scope.get(ENDPOINT, "none"), status)
        if reason:
            self._metrics.refuse(reason, seconds)
        if not self._log_requests and (status < 500 or status == 503):
            return  # metrics count them; an overload shall not fill a disk as well
        facts: dict[str, Any] = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(1e3 * seconds, 3),
            **{name.decode().replace("-", "_"): value.decode() for name, value in marks},
        }
        if reason:
            facts["reason"] = reason
        logger.info("request", extra={"facts": facts})


def as_refusal(error: Refusal | HTTPException | InferenceFailed) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, InferenceFailed):
        return Refusal(str(error), status=500, reason="engine")
    headers = tuple(
        (name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()
    )
    return Refusal(str(error.detail), status=error.status_code, reason="unknown", headers=headers)


async def _send_refusal(refusal: Refusal, send: Send) -> None:
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
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
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
