"""Refusing without the application, when not one image more can be accepted.

Under an overload nearly everything that is sent is a refusal, and what those cost is time for which
the accepted requests wait. So they are made where a request's headers end: no task, no body kept,
no picture decoded, nothing parsed.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

from eps_deploy.serving.frame import ENDPOINT, Frame, Message, Receive, Scope, Send
from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.service import Service


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
