"""Messages on their way to the server, in bounded memory.

How large a message is gRPC says when all of it is there. So each gets the room of the largest that
is accepted, and no more of them are received at a time than there is such room.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from grpc import aio

from eps_deploy.serving.limits import Limits, Memory
from eps_deploy.serving.protocol import ApiError, busy

_ENVELOPE = 64 << 10  # bytes of a request beside its pixels
_PER_PIXEL = 2  # bytes at most, as a varint
_HURRY = 1.0  # seconds for a message when others wait for its place


def largest(limits: Limits, images: tuple[int, ...]) -> int:
    """Bytes of the largest message that could be right, with images of this shape."""
    return min(limits.body, _PER_PIXEL * math.prod(images) + _ENVELOPE)


class Arrivals:
    """Receives messages; belongs to the event loop.

    Args:
        limits: see there.
        memory: counts what is held; half of it may be messages that are on their way.
        largest: bytes of a message; grpcio has to refuse larger ones.
    """

    def __init__(self, limits: Limits, memory: Memory, largest: int) -> None:
        self._seconds = limits.body_seconds
        self._memory = memory
        self._largest = largest
        self._places = max(1, min(limits.connections, limits.memory // 2 // largest))
        self._free = self._places
        self._waiting: list[asyncio.Future[None]] = []

    @asynccontextmanager
    async def message(self, context: Any) -> AsyncIterator[bytes]:
        """The message of a call; its memory is counted until the end of this.

        Raises Refusal: there is no room, it takes too long, or there is none.
        """
        await self._enter()
        try:
            content = await self._receive(context)
        finally:
            self._leave()
        try:
            yield content
        finally:
            self._memory.give_back(len(content))

    async def _receive(self, context: Any) -> bytes:
        self._memory.take(self._largest)
        kept = 0
        try:
            content = await asyncio.wait_for(context.read(), self._patience())
            if content is aio.EOF:
                # Of a message that is too large grpcio has told the client by itself already.
                raise ApiError(
                    f"the call came without its message, or with one of more than {self._largest}"
                    " bytes; the server's --max-body and --max-queue set that",
                    reason="no-message",
                )
            assert isinstance(content, bytes)
            kept = len(content)
            return content
        except asyncio.TimeoutError:
            raise ApiError("the message took too long", status=408, reason="slow") from None
        finally:
            self._memory.give_back(self._largest - kept)

    def _patience(self) -> float:
        """A client may take its time as long as half of the places are there for others."""
        return self._seconds if 2 * self._free >= self._places else _HURRY

    async def _enter(self) -> None:
        if self._free:
            self._free -= 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await asyncio.wait_for(place, self._seconds)
        except BaseException as error:
            if place.done() and not place.cancelled():
                self._leave()  # it was given in this very moment
            if isinstance(error, asyncio.TimeoutError):
                raise busy("too many messages are on their way", reason="memory") from None
            raise
        finally:
            self._waiting.remove(place)

    def _leave(self) -> None:
        # The last one first: those before it may be many that will never send anything.
        for place in reversed(self._waiting):
            if not place.done():
                place.set_result(None)
                return
        self._free += 1
