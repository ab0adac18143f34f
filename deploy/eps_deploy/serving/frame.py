"""What happens around every HTTP request: errors as JSON, and what `envelope` has.

A plain ASGI application, so that it costs microseconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from eps_deploy.serving.envelope import Account, check_token, identify, log_mistake
from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.refusals import InferenceFailed, Refusal, as_refusal

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
        except (Refusal, HTTPException, InferenceFailed) as error:
            refusal = _as_refusal(error)
            reason = refusal.reason
            if not status:
                await _send_refusal(refusal, marked)
        except Exception:
            reason = "internal"
            log_mistake(marks)
            if not status:
                await _send_refusal(Refusal("internal error", status=500, reason=reason), marked)
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


def _as_refusal(error: Refusal | HTTPException | InferenceFailed) -> Refusal:
    if not isinstance(error, HTTPException):
        return as_refusal(error)
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
