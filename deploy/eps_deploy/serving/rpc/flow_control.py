"""Receive gRPC messages in bounded memory: flow control, and raw tensors as views.

gRPC tells the size of a message only when all of it is there. So each message reserves the memory
of the largest one that is accepted, and no more are received at a time than fit. protobuf is given
a ModelInferRequest without its raw tensors and with a bounded number of fields: two bytes of an
empty tensor become a hundred in memory.
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

_OVERHEAD = 64 << 10  # bytes of a request beside its pixels
_BYTES_PER_PIXEL = 2  # at most, as a varint
_CONTENDED_SECONDS = 1.0  # for a message while other calls wait for its slot


def max_message_size(limits: Limits, images: tuple[int, ...]) -> int:
    """Bytes of the largest valid message, for images of shape `[N, C, H, W]`."""
    return min(limits.body, _BYTES_PER_PIXEL * math.prod(images) + _OVERHEAD)


class MessageReceiver:
    """Receive the messages of calls; belongs to the event loop.

    Messages that are being received take up to half of the memory. grpcio must be configured to
    reject those of more than `max_size` bytes.
    """

    def __init__(self, limits: Limits, memory: Memory, max_size: int) -> None:
        self._seconds = limits.body_seconds
        self._memory = memory
        self._max_size = max_size
        self._slots = max(1, min(limits.connections, limits.memory // 2 // max_size))
        self._free = self._slots
        self._waiting: list[asyncio.Future[None]] = []

    @asynccontextmanager
    async def message(self, context: Any) -> AsyncIterator[bytes]:
        """The message of a call; its memory stays counted until this context ends.

        Raises ApiError: there is no room for it, it is too slow, or there is none.
        """
        await self._acquire_slot()
        try:
            content = await self._receive(context)
        finally:
            self._release_slot()
        try:
            yield content
        finally:
            self._memory.give_back(len(content))

    async def _receive(self, context: Any) -> bytes:
        # A client may be slow while at least half of the slots are free for others.
        seconds = self._seconds if 2 * self._free >= self._slots else _CONTENDED_SECONDS
        self._memory.take(self._max_size)
        kept = 0
        try:
            content: bytes = await asyncio.wait_for(context.read(), seconds)
            if content is aio.EOF:
                # grpcio has already answered a message that is too large.
                raise ApiError(
                    f"the call came without its message, or with one of more than {self._max_size}"
                    " bytes; the server's --max-body and --max-queue set that",
                    reason="no-message",
                )
            kept = len(content)
            return content
        except asyncio.TimeoutError:
            raise ApiError("the message took too long", status=408, reason="slow") from None
        finally:
            self._memory.give_back(self._max_size - kept)

    async def _acquire_slot(self) -> None:
        if self._free:
            self._free -= 1
            return
        slot = asyncio.get_running_loop().create_future()
        self._waiting.append(slot)
        try:
            await asyncio.wait_for(slot, self._seconds)
        except BaseException as error:
            if slot.done() and not slot.cancelled():
                self._release_slot()  # it was granted at this very moment
            if isinstance(error, asyncio.TimeoutError):
                raise busy("too many messages are on their way", reason="memory") from None
            raise
        finally:
            self._waiting.remove(slot)

    def _release_slot(self) -> None:
        # The last one first: those before it may be many that will never send anything.
        for slot in reversed(self._waiting):
            if not slot.done():
                slot.set_result(None)
                return
        self._free += 1


# -- The outermost fields of a ModelInferRequest, read without protobuf and without copying pixels
#
# Source: protobuf's "Encoding". A message is a row of fields, a field a tag (number and wire type)
# and a value.

_RAW_INPUT_CONTENTS = 7 << 3 | 2  # tag: field 7, of bytes
_MAX_FIELDS = 256  # a tensor, an output and each parameter are one
_VARINT, _BYTES = 0, 2  # wire types
_FIXED_SIZES = {1: 8, 5: 4}  # bytes of a value, by wire type


def split_raw_tensors(content: bytes) -> tuple[bytes, list[memoryview]]:
    """Split an encoded message into the message without raw tensors, and the tensors as views.

    Raises ApiError: not a protobuf message, or more fields than any request needs.
    """
    view = memoryview(content)
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    end = 0
    while end < len(content):
        if len(rest) + len(raw) == _MAX_FIELDS:
            raise ApiError(f"the message has more than {_MAX_FIELDS} fields")
        begin = end
        tag, start = _varint(content, begin)
        wire_type = tag & 7
        if wire_type == _BYTES:
            size, start = _varint(content, start)
            end = start + size
        elif wire_type == _VARINT:
            end = _varint(content, start)[1]
        elif wire_type in _FIXED_SIZES:
            end = start + _FIXED_SIZES[wire_type]
        else:
            raise _malformed()
        if end > len(content):
            raise _malformed()
        if tag == _RAW_INPUT_CONTENTS:
            raw.append(view[start:end])
        else:
            rest.append(view[begin:end])
    return b"".join(rest), raw


def _varint(content: bytes, start: int) -> tuple[int, int]:
    """An integer of up to ten bytes with seven bits in each, and where it ends."""
    number = 0
    for count, byte in enumerate(content[start : start + 10]):
        number |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return number, start + count + 1
    raise _malformed()


def _malformed() -> ApiError:
    return ApiError("the message is no ModelInferRequest of the Open Inference Protocol")
