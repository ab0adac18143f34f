"""Connections under limits: their number, the size of headers, and clients that take their time.

Uvicorn's HTTP/1.1 protocol on httptools (llhttp), which has none of these limits by itself.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, MutableMapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from eps_deploy.serving.limits import Limits
from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.middleware import ENDPOINT, GONE, Frame, Message, Receive, Scope, Send
from eps_deploy.serving.service import Service

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

Shed = Callable[[bytes, bytes, MutableMapping[str, Any], bool], bytes | None]
_UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)
_LAST_CHANCE = 0.2  # seconds that an idle connection gets for a request that is on its way
_REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


class LimitedProtocol(HttpToolsProtocol):
    """One connection. `limits` and `shed` are set by :func:`limited`."""

    limits: Limits
    shed: Shed

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_header = True
        self._refused = False
        self._shed = False  # the request whose body is being read was answered by `shed`
        self._reading: RequestResponseCycle | None = None  # whose body is being read
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
        self._unset_keepalive_if_required()
        self._in_header = True

    def on_headers_complete(self) -> None:
        self._in_header = False
        self._header_bytes = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.header:
            self._refuse(431, self._too_large())
            raise httptools.HttpParserError("headers too large")
        answer = self._answer_at_once()
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
        if self._ending or not self._stays():
            self.transport.close()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

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
        elif self._shed or (self._in_header and not self._header_bytes):
            self._unset_keepalive_if_required()
            self._set_timer(_LAST_CHANCE, "the server is shutting down")

    def _answer_at_once(self) -> bytes | None:
        """An answer that needs no application; None where it would come out of turn."""
        in_turn = self.cycle is None or self.cycle.response_complete
        if not in_turn or self._ending or self.expect_100_continue or self.flow.write_paused:
            return None
        scope = cast("dict[str, Any]", self.scope)
        return self.shed(self.parser.get_method(), self.url, scope, self._stays())

    def _stays(self) -> bool:
        """Whether the client wants the connection kept after the request that is being read."""
        return bool(self.parser.get_http_version() == "1.1" and self.parser.should_keep_alive())

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


def limited(limits: Limits, shed: Shed) -> type[LimitedProtocol]:
    """The protocol's class with these limits, as uvicorn wants it.

    `shed` gets method, URL and ASGI scope of a request, and whether the connection is kept after
    it, and returns the answer if that is certain already.
    """
    return type("Limited", (LimitedProtocol,), {"limits": limits, "shed": staticmethod(shed)})


# -- Refusing without the application, when not one image more can be accepted
#
# Under an overload nearly everything that is sent is a refusal, and what those cost is time for
# which the accepted requests wait. So they are made where a request's headers end: no task, no
# body kept, no picture decoded, nothing parsed.


class Shedder:
    """Answers in the application's place.

    Args:
        service: whose queue is looked at.
        metrics: count these answers too.
        token, log_requests: as :class:`Frame` has them.
    """

    def __init__(
        self, service: Service, metrics: Metrics, *, token: bytes | None, log_requests: bool
    ) -> None:
        self._service = service
        infer = f"/v2/models/{service.name}/infer"
        self._endpoints = {
            path.encode(): (path, name)
            for path, name in ((infer, "infer"), ("/v1/classify", "classify"))
        }
        self._let_in = 0  # since the event loop turned, so that they do not wait in the queue yet
        self._frame = Frame(self._refuse, metrics, token=token, log_requests=log_requests)

    def answer(self, method: bytes, url: bytes, scope: Scope, stays: bool) -> bytes | None:
        """The whole answer to a request of which only the headers are known.

        None: there may be room for it, or it wants no inference. What comes by an unusual path
        (another version of the model, escapes) is left to the application as well.

        Args:
            method: of HTTP.
            url: as it stands in the request line.
            scope: of ASGI, with `headers`.
            stays: whether the connection is kept after this request.
        """
        endpoint = self._endpoints.get(url.partition(b"?")[0])
        if endpoint is None or method != b"POST":
            return None
        if self._let_in < self._service.room:
            self._let_one_in()
            return None
        scope.update({"method": "POST", "path": endpoint[0], ENDPOINT: endpoint[1]})
        return _at_once(self._frame, scope, b"" if stays else b"connection: close\r\n")

    def _let_one_in(self) -> None:
        if not self._let_in:
            # Runs before the tasks of those that are let in now, which then join the queue.
            asyncio.get_running_loop().call_soon(self._forget)
        self._let_in += 1

    def _forget(self) -> None:
        self._let_in = 0

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise self._service.current.batcher.refusal()


def _at_once(frame: Frame, scope: Scope, last: bytes) -> bytes:
    """What an application that waits for nothing sends, as HTTP/1.1, with `last` in the headers."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    running = frame(scope, _nothing, send)
    try:
        running.send(None)
    except StopIteration:
        pass
    else:
        raise AssertionError("a refusal waits for nothing")
    start, body = sent
    status = HTTPStatus(start["status"])
    first = f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode()
    headers = (b"%s: %s\r\n" % header for header in start["headers"])
    return b"".join((first, *headers, last, b"\r\n", body["body"]))


async def _nothing() -> MutableMapping[str, Any]:
    raise AssertionError("a refusal reads nothing")
