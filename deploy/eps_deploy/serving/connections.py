"""HTTP connections: limits on their number, headers and slow clients, and load shedding.

Uvicorn's HTTP/1.1 protocol on httptools (llhttp), which has none of these limits by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import httptools
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from eps_deploy.serving.limits import Limits
from eps_deploy.serving.middleware import ENDPOINT, ON_DISCONNECT, Access, HttpMiddleware
from eps_deploy.serving.service import Service

Shed = Callable[[bytes, bytes, Scope, bool], bytes | None]
_UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)
_DRAIN_PAUSE = 0.2  # seconds that an idle connection stays open for a request that is on its way


class LimitedProtocol(HttpToolsProtocol):
    """One connection.

    `shed` receives method, URL and ASGI scope of a request, and whether the connection is kept
    after it; it returns the answer if the request is to be shed.
    """

    def __init__(self, limits: Limits, shed: Shed, **given: Any) -> None:
        super().__init__(**given)
        self.limits = limits
        self.shed = shed
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0  # received of the header that is being read
        self._in_header = True
        self._rejected = False
        self._shed = False  # the request whose body is being read was answered by `shed`
        self._reading: RequestResponseCycle | None = None  # whose body is being read
        self._ending = False  # the server is shutting down
        self._running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections and not self._close_idle():
            self._reject(503, "too many connections", "Retry-After: 1\r\n")
        else:
            self._time_header()

    def data_received(self, data: bytes) -> None:
        if self._rejected or self.transport.is_closing():
            return
        if self._in_header:
            if self._timer is None:
                self._time_header()
            self._header_bytes += len(data)
            data = _without_upgrade(data)
        super().data_received(data)
        if self._in_header and self._header_bytes > self.limits.header and not self._rejected:
            self._reject(431, self._too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._in_header = True

    def on_headers_complete(self) -> None:
        self._in_header = False
        self._header_bytes = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.header:
            self._reject(431, self._too_large())
            raise httptools.HttpParserError("headers too large")
        answer = self._shed_answer()
        if answer is not None:
            self._shed = True
            self.transport.write(answer)
        else:
            super().on_headers_complete()
            self._reading = self.cycle
            if self._ending:
                self.cycle.keep_alive = False
        self._set_timer(self.limits.body_seconds, "the request's body took too long")

    def on_body(self, body: bytes) -> None:
        if not self._shed:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._clear_timer()
        self._in_header = True  # of the next request on this connection
        self._reading = None
        if not self._shed:
            super().on_message_complete()
            return
        self._shed = False
        if self._ending or not self._keep_alive():
            self.transport.close()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def send_400_response(self, msg: str) -> None:
        self._reject(400, "not a valid HTTP/1.1 request")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

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
            disconnected: Any = self._running.scope.get(ON_DISCONNECT)
            if disconnected is not None:
                disconnected()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def shutdown(self) -> None:
        """Shut down, but answer a request that was sent before the client could know."""
        self._ending = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        elif self._shed or (self._in_header and not self._header_bytes):
            self._unset_keepalive_if_required()
            self._set_timer(_DRAIN_PAUSE, "the server is shutting down")

    def _shed_answer(self) -> bytes | None:
        """The answer of load shedding; None: there is none, or it would come out of turn."""
        in_turn = self.cycle is None or self.cycle.response_complete
        if not in_turn or self._ending or self.expect_100_continue or self.flow.write_paused:
            return None
        scope = cast("dict[str, Any]", self.scope)
        return self.shed(self.parser.get_method(), self.url, scope, self._keep_alive())

    def _keep_alive(self) -> bool:
        """Whether the client keeps the connection after the request that is being read."""
        return bool(self.parser.get_http_version() == "1.1" and self.parser.should_keep_alive())

    def _close_idle(self) -> bool:
        """Close a connection on which no request is in progress; False: there is none."""
        for other in self.connections:
            idle = isinstance(other, LimitedProtocol) and other.timeout_keep_alive_task is not None
            if other is not self and idle:
                other.transport.close()
                return True
        return False

    def _time_header(self) -> None:
        self._set_timer(self.limits.header_seconds, "the request's headers took too long")

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
            self._reject(408, message)

    def _too_large(self) -> str:
        return f"the request line and headers are larger than {self.limits.header} bytes"

    def _reject(self, status: int, message: str, headers: str = "") -> None:
        """Answer without the application, and close."""
        if self._rejected or self.transport.is_closing():
            return
        self._rejected = True
        self._clear_timer()
        if self._shed or (self._reading is not None and self._reading.response_complete):
            self.transport.close()  # the request was answered before its body came
            return
        cycle = self._running
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        body = json.dumps({"error": message})
        self.transport.write(
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n{headers}connection: close\r\n\r\n{body}".encode()
        )
        self.transport.close()


def _without_upgrade(data: bytes) -> bytes:
    """Hide the header Upgrade, an offer that a server may ignore (RFC 9110, 7.8).

    With such a header httptools takes the body for that protocol's data. Java's client offers
    HTTP/2 in its first request to every server.
    """
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    if _UPGRADE.search(head) is None:
        return data
    return _UPGRADE.sub(b"\r\nx-not-taken:", head) + data[len(head) :]


# -- Load shedding
#
# Under overload nearly every answer is an error, and the accepted requests wait for the time that
# those take. So they are made at the end of a request's headers: no task, no body kept, no image
# decoded, nothing parsed.


class LoadShedder:
    """Answer inference requests in the application's place while the queue is full."""

    def __init__(self, service: Service, access: Access) -> None:
        self._service = service
        self._endpoints = {f"/v2/models/{service.name}/infer": "infer", "/v1/classify": "classify"}
        self._admitted = 0  # in this turn of the event loop: they are not in the queue yet
        self._middleware = HttpMiddleware(self._queue_full, access)

    def answer(self, method: bytes, url: bytes, scope: Scope, keep_alive: bool) -> bytes | None:
        """Return the whole answer to a request of which only the headers are known.

        None: there may be room for it, or it is not for inference. A request with an unusual path
        (a version of the model, escapes) is left to the application as well.
        """
        path = url.partition(b"?")[0].decode("latin-1")
        endpoint = self._endpoints.get(path)
        if endpoint is None or method != b"POST":
            return None
        if self._admitted < self._service.room:
            if not self._admitted:
                # Runs before the tasks of those that are admitted now, which then join the queue.
                asyncio.get_running_loop().call_soon(self._reset)
            self._admitted += 1
            return None
        scope.update({"method": "POST", "path": path, ENDPOINT: endpoint})
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            raise AssertionError("a shed request is not read")

        with contextlib.suppress(StopIteration):
            self._middleware(scope, receive, send).send(None)
            raise AssertionError("load shedding awaits nothing")
        start, body = sent
        status = HTTPStatus(start["status"])
        first = f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode()
        headers = (b"%s: %s\r\n" % header for header in start["headers"])
        last_header = b"" if keep_alive else b"connection: close\r\n"
        return b"".join((first, *headers, last_header, b"\r\n", body["body"]))

    def _reset(self) -> None:
        self._admitted = 0

    async def _queue_full(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise self._service.current.batcher.queue_full()
