"""Open-loop load generator: its request rate does not depend on the speed of the answers.

It must cost little beside the server under test: bytes made before, one epoll, kept connections.
Nobody waits because the server is slow; what is refused is simply followed by the next request.
"""

from __future__ import annotations

import json
import math
import select
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tests.deploy.serving.running import MODEL, Client

_LATE = 0.05  # seconds after which a request that found no connection is given up
_TURN = 1.0  # seconds for which a rate is kept

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int16]


class Outcome:
    """What came of it: `sent` requests, and a row for each answer in the columns below."""

    def __init__(self) -> None:
        self.sent = 0
        self.good = 0
        self._began, self._ended = array("d"), array("d")
        self._kind, self._status, self._retry = array("h"), array("h"), array("h")

    def add(self, kind: int, began: float, status: int, retry: int) -> None:
        self._kind.append(kind)
        self._began.append(began)
        self._ended.append(time.perf_counter())
        self._status.append(status)
        self._retry.append(retry)
        self.good += status == 200

    @property
    def seconds(self) -> Floats:
        """From before a request was sent until its answer was read whole."""
        return self.ended - self.began

    @property
    def began(self) -> Floats:
        return np.array(self._began)

    @property
    def ended(self) -> Floats:
        return np.array(self._ended)

    @property
    def kind(self) -> Whole:
        """Which of the requests it was."""
        return np.array(self._kind)

    @property
    def status(self) -> Whole:
        """Of HTTP; 0: the connection was closed."""
        return np.array(self._status)

    @property
    def retry(self) -> Whole:
        """Retry-After; -1: without."""
        return np.array(self._retry)


def infer_request(shape: tuple[int, ...], fill: int = 7) -> bytes:
    """A whole infer request with these pixels as raw bytes: shape `[N, C, H, W]`, uint8."""
    pixels = bytes([fill]) * math.prod(shape)
    tensor = {
        "name": "images",
        "datatype": "UINT8",
        "shape": shape,
        "parameters": {"binary_data_size": len(pixels)},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    lines = (
        f"POST {MODEL}/infer HTTP/1.1",
        "host: localhost",
        "content-type: application/octet-stream",
        f"inference-header-content-length: {len(head)}",
        f"content-length: {len(head) + len(pixels)}",
    )
    return "\r\n".join((*lines, "", "")).encode() + head + pixels


class Crowd:
    """Kept connections to a server; a context manager.

    Args:
        client: names the server.
        requests: whole ones, that are sent in turns.
        connections: how many.
    """

    def __init__(self, client: Client, requests: Sequence[bytes], connections: int) -> None:
        self._requests = requests
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        for _ in range(connections):
            made = client.open()
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.setblocking(False)
            self._sockets[made.fileno()] = made
            self._poll.register(made.fileno(), select.EPOLLIN)
        self._idle = deque(self._sockets)
        self._under_way: dict[int, tuple[int, float]] = {}
        self._partial: dict[int, bytes] = {}

    def offer(
        self, seconds: float, *, over: float = 0.0, watch: Callable[[], None] = lambda: None
    ) -> Outcome:
        """Send for so long, then wait for the answers that are still to come.

        Args:
            seconds: how long.
            over: send this many times as many as were answered with 200 in the second before (for
                the machine may become slower or faster meanwhile); 0: one on each connection as
                soon as it is free, a closed loop.
            watch: called once a second.
        """
        outcome = Outcome()
        began = due = now = time.perf_counter()
        end, turn, before = began + seconds, began + _TURN, 0
        step = 0.0
        while now < end or self._under_way:
            now = time.perf_counter()
            if now >= turn:
                if over:
                    step = (now - turn + _TURN) / (over * max(outcome.good - before, 1))
                before, turn = outcome.good, now + _TURN
                watch()
            while due <= now < end and self._idle:
                self._send(outcome)
                due += step
            due = max(due, now - _LATE)
            pause = max(due - now, 0.0) if self._idle and now < end else 0.05
            for number, _ in self._poll.poll(pause):
                self._read(number, outcome)
        return outcome

    def _send(self, outcome: Outcome) -> None:
        number = self._idle.popleft()
        kind = outcome.sent % len(self._requests)
        self._under_way[number] = kind, time.perf_counter()
        assert self._sockets[number].send(self._requests[kind]) == len(self._requests[kind])
        outcome.sent += 1

    def _read(self, number: int, outcome: Outcome) -> None:
        data = self._sockets[number].recv(65536)
        text = self._partial.pop(number, b"") + data
        head, found, body = text.partition(b"\r\n\r\n")
        if data and not (found and len(body) >= _header(head, b"content-length", 0)):
            self._partial[number] = text
            return
        if number in self._under_way:
            kind, began = self._under_way.pop(number)
            status = int(head[9:12]) if data else 0
            outcome.add(kind, began, status, _header(head, b"retry-after", -1))
        if data:
            self._idle.append(number)
        else:
            self._poll.unregister(number)

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for made in self._sockets.values():
            made.close()
        self._poll.close()


def _header(head: bytes, name: bytes, default: int) -> int:
    start = head.find(b"\r\n" + name + b": ")
    return int(head[start + len(name) + 4 :].split(b"\r\n", 1)[0]) if start >= 0 else default
