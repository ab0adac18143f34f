"""Receiving messages: bounded memory, slow clients that delay nobody, raw tensors as views."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from grpc import aio
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as messages

from eps_deploy.serving.limits import Limits, Memory
from eps_deploy.serving.protocol import ApiError
from eps_deploy.serving.rpc import flow_control
from eps_deploy.serving.rpc.flow_control import (
    MessageReceiver,
    max_message_size,
    split_raw_tensors,
)
from tests.deploy.serving.rpc.client import blank, request

LARGEST = 100
LIMITS = Limits(memory=8 * LARGEST, body_seconds=60)  # four places


class Sent:
    """In place of grpcio's context: a message that comes when `come` is called."""

    def __init__(self, content: Any = None) -> None:
        self._content: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if content is not None:
            self.come(content)

    def come(self, content: Any) -> None:
        self._content.set_result(content)

    async def read(self) -> Any:
        return await self._content


def check(
    test: Callable[[MessageReceiver, Memory], Awaitable[None]], limits: Limits = LIMITS
) -> None:
    async def body() -> None:
        memory = Memory(limits.memory)
        await asyncio.wait_for(test(MessageReceiver(limits, memory, LARGEST), memory), 60)
        assert memory.used == 0

    asyncio.run(body())


async def received(receiver: MessageReceiver, sent: Sent) -> bytes:
    async with receiver.message(sent) as content:
        return content


def started(receiver: MessageReceiver, sent: Sent) -> asyncio.Task[bytes]:
    return asyncio.create_task(received(receiver, sent))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_max_message_size() -> None:
    assert max_message_size(Limits(), (256, 1, 8, 8)) == 2 * 256 * 64 + 65536
    assert max_message_size(Limits(body=1000), (256, 3, 224, 224)) == 1000


def test_held_memory_is_counted() -> None:
    async def test(receiver: MessageReceiver, memory: Memory) -> None:
        sent = Sent()
        waiting = started(receiver, sent)
        await turns()
        assert memory.used == LARGEST  # nobody knows yet how large it is
        sent.come(b"12345")
        async with receiver.message(Sent(b"abc")) as content:
            assert content == b"abc"
            assert await waiting == b"12345"
            assert memory.used == 3
        with pytest.raises(ApiError, match="without its message"):
            await received(receiver, Sent(aio.EOF))

    check(test)


def test_messages_received_at_a_time_are_bounded() -> None:
    async def test(receiver: MessageReceiver, memory: Memory) -> None:
        sent = [Sent() for _ in range(6)]
        waiting = [started(receiver, each) for each in sent]
        await turns()
        assert memory.used == 4 * LARGEST
        for number, each in enumerate(sent):
            each.come(b"%d" % number)
        assert await asyncio.gather(*waiting) == [b"0", b"1", b"2", b"3", b"4", b"5"]

    check(test)


def test_memory_taken_by_others() -> None:
    async def test(receiver: MessageReceiver, memory: Memory) -> None:
        memory.take(7 * LARGEST + 1)
        with pytest.raises(ApiError, match="as it has memory for") as caught:
            await received(receiver, Sent(b"x"))
        assert (caught.value.status, caught.value.retry_after) == (503, 1)
        memory.give_back(7 * LARGEST + 1)
        assert await received(receiver, Sent(b"x")) == b"x"

    check(test)


def test_a_message_that_never_comes() -> None:
    async def test(receiver: MessageReceiver, memory: Memory) -> None:
        with pytest.raises(ApiError, match="took too long") as caught:
            await received(receiver, Sent())
        assert caught.value.status == 408

    check(test, Limits(memory=8 * LARGEST, body_seconds=0.05))


def test_slow_clients_delay_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred that send nothing, for four places; and one that does, after them."""
    monkeypatch.setattr(flow_control, "_CONTENDED_SECONDS", 0.05)

    async def test(receiver: MessageReceiver, memory: Memory) -> None:
        slow = [started(receiver, Sent()) for _ in range(100)]
        await turns()
        assert await received(receiver, Sent(b"here")) == b"here"
        assert sum(task.done() for task in slow) < 10
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        assert await received(receiver, Sent(b"here")) == b"here"

    check(test)


def test_a_slot_that_never_becomes_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_control, "_CONTENDED_SECONDS", 60)

    async def test(receiver: MessageReceiver, memory: Memory) -> None:
        slow = [started(receiver, Sent()) for _ in range(4)]
        await turns()
        monkeypatch.setattr(receiver, "_seconds", 0.05)  # not for those that have a slot
        with pytest.raises(ApiError) as caught:
            await received(receiver, Sent(b"here"))
        assert (caught.value.status, caught.value.reason) == (503, "memory")
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

    check(test)


def test_clients_that_go_away_while_they_wait() -> None:
    async def test(receiver: MessageReceiver, memory: Memory) -> None:
        slow = [Sent() for _ in range(4)]
        at_work = [started(receiver, each) for each in slow]
        await turns()
        waiting = [started(receiver, Sent(b"x")) for _ in range(3)]
        await turns()
        waiting[2].cancel()
        slow[0].come(b"y")  # whose place goes to one that is still there
        waiting[1].cancel()
        await turns()
        for each in slow[1:]:
            each.come(b"y")
        assert await asyncio.gather(*at_work) == [b"y"] * 4
        assert await waiting[0] == b"x"
        assert await asyncio.gather(*(received(receiver, Sent(b"z")) for _ in range(9)))

    check(test)


# -- Splitting raw tensors off


def test_split_a_request() -> None:
    message = request(blank(3))
    message.id = "7"
    message.parameters["timeout"].int64_param = 5
    message.raw_input_contents.append(b"more")
    rest, raw = split_raw_tensors(message.SerializeToString())
    assert [bytes(tensor) for tensor in raw] == [blank(3).tobytes(), b"more"]
    del message.raw_input_contents[:]
    assert messages.ModelInferRequest.FromString(rest) == message


def test_pixels_are_not_copied() -> None:
    content = request(blank(100)).SerializeToString()
    _, (tensor,) = split_raw_tensors(content)
    assert tensor.obj is content


def test_fields_of_every_kind_are_kept_in_order() -> None:
    content = b"\x08\x96\x01\x11" + bytes(8) + b"\x12\x02hi\x1d" + bytes(4)
    assert split_raw_tensors(content) == (content, [])
    assert split_raw_tensors(b"") == (b"", [])


@pytest.mark.parametrize(
    "content",
    [
        b"\x08",  # no value
        b"\x08" + b"\xff" * 20,  # a number without an end
        b"\x3a\x05abcd",  # a tensor that is cut
        b"\x3a" + b"\xff" * 9 + b"\x01",  # of a size beyond everything
        b"\x11" + bytes(7),
        b"\x1d" + bytes(3),
        b"\x0b\x0c",  # a group, which protobuf had once
        b"\x0e",
    ],
)
def test_not_a_message(content: bytes) -> None:
    with pytest.raises(ApiError, match="no ModelInferRequest"):
        split_raw_tensors(content)


def test_millions_of_empty_fields() -> None:
    """Protobuf would make an object of each."""
    with pytest.raises(ApiError, match="more than 256 fields"):
        split_raw_tensors(b"\x2a\x00" * 1_000_000)
    assert split_raw_tensors(b"\x2a\x00" * 256)[0] == b"\x2a\x00" * 256


@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    """Split or refused; and nothing is lost."""
    try:
        rest, raw = split_raw_tensors(content)
    except ApiError:
        return
    size = sum(len(tensor) for tensor in raw)
    assert len(rest) + size <= len(content)
    assert len(content) - len(rest) - size <= 20 * len(raw)
