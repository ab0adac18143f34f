"""Connections under limits: their number, the size of headers, and clients that take their time.

Uvicorn's HTTP/1.1 protocol on httptools (llhttp), which has none of these limits by itself.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from eps_deploy.serving.frame import GONE
from eps_deploy.serving.limits import Limits

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

_UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)
_LAST_CHANCE = 0.2  # seconds that an idle connection gets for a request that is on its way
_REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


class LimitedProtocol(HttpToolsProtocol):
    """One connection. `limits` is set by :func:`limited`."""

    limits: Limits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_header = True
        self._refused = False
        self._ending = False  # the server is
        self._running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections and not self._close_an_idle_one():
            self._refuse(503, "too many connections", "Retry-After: 1\r\n")
            return
        self._set_timer(self.limits.header_seconds, "the request's headers took too long")

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self._in_header:
            if self._timer is None:
                self._set_timer(self.limits.header_seconds, "the request's headers took too long")
            self._header_bytes += len(data)
            data = _without_upgrade(data)
        super().data_received(data)
        if self._in_header and self._header_bytes > self.limits.header and not self._refused:
            self._refuse(431, self._too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_header = True

    def on_headers_complete(self) -> None:
        self._in_header = False
        self._header_bytes = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.header:
            self._refuse(431, self._too_large())
            raise httptools.HttpParserError("headers too large")
        super().on_headers_complete()
        if self._ending:
            self.cycle.keep_alive = False
        self._set_timer(self.limits.body_seconds, "the request's body took too long")

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._clear_timer()
        self._in_header = True  # of the next request on this connection

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "not a valid HTTP/1.1 request")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_seconds, self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_timer()
        super().connection_lost(exc)
        if self._write_timer is not None:
            self._write_timer.cancel()
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            gone: Callable[[], None] | None = self._running.scope.get(GONE)  # type: ignore[assignment]
            if gone is not None:
                gone()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def shutdown(self) -> None:
        """The server ends: a request that was sent before the client could know is answered."""
        self._ending = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        elif self._in_header and not self._header_bytes:
            self._unset_keepalive_if_required()
            self._set_timer(_LAST_CHANCE, "the server is shutting down")

    def _close_an_idle_one(self) -> bool:
        """Make room by closing a connection on which no request is under way."""
        for other in self.connections:
            idle = isinstance(other, LimitedProtocol) and other.timeout_keep_alive_task is not None
            if other is not self and idle:
                other.transport.close()
                return True
        return False

    def _set_timer(self, seconds: float, message: str) -> None:
        self._clear_timer()
        self._timer = self.loop.call_later(seconds, self._too_slow, message)

    def _clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self, message: str) -> None:
        self._timer = None
        nothing_sent = self._in_header and not self._header_bytes
        if nothing_sent:  # there is no request to answer
            self.transport.close()
        else:
            self._refuse(408, message)

    def _too_large(self) -> str:
        return f"the request line and headers are larger than {self.limits.header} bytes"

    def _refuse(self, status: int, message: str, headers: str = "") -> None:
        """Answer without the application, and close."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._clear_timer()
        cycle = self._running
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        body = json.dumps({"error": message})
        self.transport.write(
            f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n{headers}connection: close\r\n\r\n{body}".encode()
        )
        self.transport.close()

    def _abort(self) -> None:
        self.transport.abort()


def _without_upgrade(data: bytes) -> bytes:
    """Hide an offer to go on in another protocol, which nobody has to take (RFC 9110, 7.8).

    With such a header httptools takes the body for that protocol's data. Java's client offers
    HTTP/2 in its first request to every server.
    """
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    if _UPGRADE.search(head) is None:
        return data
    return _UPGRADE.sub(b"\r\nx-not-taken:", head) + data[len(head) :]


def limited(limits: Limits) -> type[LimitedProtocol]:
    """The protocol's class with these limits, as uvicorn wants it."""
    return type("Limited", (LimitedProtocol,), {"limits": limits})
