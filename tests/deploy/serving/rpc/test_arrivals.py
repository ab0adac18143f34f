"""Messages on their way: bounded memory, and slow clients that hold up nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from grpc import aio

from eps_deploy.serving.limits import Limits, Memory
from eps_deploy.serving.protocol import ApiError
from eps_deploy.serving.rpc import arrivals as arrivals_module
from eps_deploy.serving.rpc.arrivals import Arrivals, largest

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


def check(test: Callable[[Arrivals, Memory], Awaitable[None]], limits: Limits = LIMITS) -> None:
    async def body() -> None:
        memory = Memory(limits.memory)
        await asyncio.wait_for(test(Arrivals(limits, memory, LARGEST), memory), 60)
        assert memory.used == 0

    asyncio.run(body())


async def received(arrivals: Arrivals, sent: Sent) -> bytes:
    async with arrivals.message(sent) as content:
        return content


def started(arrivals: Arrivals, sent: Sent) -> asyncio.Task[bytes]:
    return asyncio.create_task(received(arrivals, sent))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_the_largest_message_that_could_be_right() -> None:
    assert largest(Limits(), (256, 1, 8, 8)) == 2 * 256 * 64 + 65536
    assert largest(Limits(body=1000), (256, 3, 224, 224)) == 1000


def test_what_is_held_is_counted() -> None:
    async def test(arrivals: Arrivals, memory: Memory) -> None:
        sent = Sent()
        waiting = started(arrivals, sent)
        await turns()
        assert memory.used == LARGEST  # nobody knows yet how large it is
        sent.come(b"12345")
        async with arrivals.message(Sent(b"abc")) as content:
            assert content == b"abc"
            assert await waiting == b"12345"
            assert memory.used == 3
        with pytest.raises(ApiError, match="without its message"):
            await received(arrivals, Sent(aio.EOF))

    check(test)


def test_no_more_at_a_time_than_there_is_room_for() -> None:
    async def test(arrivals: Arrivals, memory: Memory) -> None:
        sent = [Sent() for _ in range(6)]
        waiting = [started(arrivals, each) for each in sent]
        await turns()
        assert memory.used == 4 * LARGEST
        for number, each in enumerate(sent):
            each.come(b"%d" % number)
        assert await asyncio.gather(*waiting) == [b"0", b"1", b"2", b"3", b"4", b"5"]

    check(test)


def test_room_that_others_have_taken() -> None:
    async def test(arrivals: Arrivals, memory: Memory) -> None:
        memory.take(7 * LARGEST + 1)
        with pytest.raises(ApiError, match="as it has memory for") as caught:
            await received(arrivals, Sent(b"x"))
        assert (caught.value.status, caught.value.retry_after) == (503, 1)
        memory.give_back(7 * LARGEST + 1)
        assert await received(arrivals, Sent(b"x")) == b"x"

    check(test)


def test_a_message_that_never_comes() -> None:
    async def test(arrivals: Arrivals, memory: Memory) -> None:
        with pytest.raises(ApiError, match="took too long") as caught:
            await received(arrivals, Sent())
        assert caught.value.status == 408

    check(test, Limits(memory=8 * LARGEST, body_seconds=0.05))


def test_slow_clients_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred that send nothing, for four places; and one that does, after them."""
    monkeypatch.setattr(arrivals_module, "_HURRY", 0.05)

    async def test(arrivals: Arrivals, memory: Memory) -> None:
        slow = [started(arrivals, Sent()) for _ in range(100)]
        await turns()
        assert await received(arrivals, Sent(b"here")) == b"here"
        assert sum(task.done() for task in slow) < 10
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        assert await received(arrivals, Sent(b"here")) == b"here"

    check(test)


def test_a_place_that_never_becomes_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals_module, "_HURRY", 60)

    async def test(arrivals: Arrivals, memory: Memory) -> None:
        slow = [started(arrivals, Sent()) for _ in range(4)]
        await turns()
        with pytest.raises(ApiError) as caught:
            await received(arrivals, Sent(b"here"))
        assert (caught.value.status, caught.value.reason) == (503, "memory")
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

    check(test, Limits(memory=8 * LARGEST, body_seconds=0.05))


def test_clients_that_go_away_while_they_wait() -> None:
    async def test(arrivals: Arrivals, memory: Memory) -> None:
        slow = [Sent() for _ in range(4)]
        at_work = [started(arrivals, each) for each in slow]
        await turns()
        waiting = [started(arrivals, Sent(b"x")) for _ in range(3)]
        await turns()
        waiting[2].cancel()
        slow[0].come(b"y")  # whose place goes to one that is still there
        waiting[1].cancel()
        await turns()
        for each in slow[1:]:
            each.come(b"y")
        assert await asyncio.gather(*at_work) == [b"y"] * 4
        assert await waiting[0] == b"x"
        assert await asyncio.gather(*(received(arrivals, Sent(b"z")) for _ in range(9)))

    check(test)
