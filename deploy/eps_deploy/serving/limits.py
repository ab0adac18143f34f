"""Limits on what clients may send, and reading a request's body within them."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import Receive

from eps_deploy.serving.protocol import ApiError, busy, too_large

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The largest accepted value of everything that a client chooses.

    Attributes:
        body: bytes of a request's body.
        json: bytes of JSON in it; a parsed number takes far more memory than a raw pixel.
        memory: bytes of all bodies together that are held at one time.
        pixels: of an image, before and after it is scaled.
        header: bytes of the request line and all headers.
        header_seconds: from the first byte to the end of the headers.
        body_seconds: from there to the end of the body.
        write_seconds: that a client may leave an answer unread.
        idle_seconds: that a connection may stay open between requests; longer than load balancers
            keep theirs (60 s is usual), so that they are never the second to close one.
        connections: open at one time.
    """

    body: int = 32 * MIB
    json: int = 8 * MIB
    memory: int = 256 * MIB
    pixels: int = 50_000_000
    header: int = 32 << 10
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    idle_seconds: int = 75
    connections: int = 1000


class Memory:
    """Count the bytes of all bodies that are held; for the event loop's thread only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0

    def take(self, size: int) -> None:
        """Raise ApiError (503) when there is no room for `size` bytes more."""
        if self.used + size > self._limit:
            raise busy("the server holds as many requests as it has memory for", reason="memory")
        self.used += size

    def give_back(self, size: int) -> None:
        self.used -= size
        assert self.used >= 0


class Body:
    """The body of one request; a context manager, because its memory is counted until the end.

    `option` of `eps-serve` sets the limit; "": none does.
    """

    def __init__(
        self,
        headers: dict[bytes, bytes],
        receive: Receive,
        limit: int,
        memory: Memory,
        option: str = "",
    ) -> None:
        self._headers = headers
        self._receive = receive
        self._limit = limit
        self._memory = memory
        self._option = option
        self._held = 0

    async def read(self) -> bytes:
        """Receive all of it. Raises ApiError: too large, compressed, or no memory for it."""
        if self._headers.get(b"content-encoding", b"identity").lower() != b"identity":
            # Unpacked, it could be of any size (RFC 9110, 15.5.16).
            raise ApiError(
                "send the body uncompressed",
                status=415,
                reason="encoding",
                headers=((b"accept-encoding", b"identity"),),
            )
        announced = self._headers.get(b"content-length", b"")
        if announced.isdigit():
            self._hold(int(announced))  # all at once, so that two halves never wait for room
        chunks, size, more = [], 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ApiError("the client went away", status=499, reason="disconnected")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            self._hold(size)
            more = message.get("more_body", False)
        return b"".join(chunks)

    def _hold(self, size: int) -> None:
        if size > self._limit:
            told = f"; the server's {self._option} sets that" if self._option else ""
            raise too_large(
                f"the body is larger than the {self._limit} bytes that are accepted{told}"
            )
        if size > self._held:
            self._memory.take(size - self._held)
            self._held = size

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.give_back(self._held)
