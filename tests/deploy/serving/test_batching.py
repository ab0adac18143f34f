"""The batcher: requests split and merged, cancelled, expired, failed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from eps_deploy.serving.batching import Batcher, Batching, BatchStats
from eps_deploy.serving.protocol import ApiError, InferenceFailed
from tests.deploy.serving.engines import FakeEngine, numbered


class Bench:
    """A batcher on a fake engine, and what it told of its batches."""

    def __init__(self, engines: list[FakeEngine], **options: Any) -> None:
        self.engine = engines[0]
        self.ran: list[BatchStats] = []
        self.batcher = Batcher(engines, Batching(**options), self.ran.append)

    async def infer(self, *values: int, timeout: float | None = None) -> list[list[float]]:
        job = self.batcher.submit(numbered(*values))
        logits: list[list[float]] = (await self.batcher.infer(job, timeout)).tolist()
        return logits

    async def entered(self, engine: FakeEngine | None = None) -> None:
        """Until the engine has one batch more to work at."""
        await asyncio.to_thread((engine or self.engine).entered.acquire)


def bench(
    test: Callable[[Bench], Awaitable[None]], engines: int = 1, **options: Any
) -> list[FakeEngine]:
    """Run a test on a batcher, and see that all of its threads end."""
    made = [FakeEngine() for _ in range(engines)]

    async def body() -> None:
        it = Bench(made, **options)
        try:
            await asyncio.wait_for(test(it), 60)
        finally:
            for engine in made:
                engine.open_gate.set()
            it.batcher.close()
            await asyncio.wait_for(it.batcher.join(), 60)

    asyncio.run(body())
    return made


def rows(*values: int) -> list[list[float]]:
    return [[value, 2 * value] for value in values]


def test_each_request_gets_its_own_logits() -> None:
    async def test(it: Bench) -> None:
        it.engine.open_gate.clear()
        first = asyncio.create_task(it.infer(1))
        await it.entered()
        others = [asyncio.create_task(it.infer(*values)) for values in ((2, 3), (4,), (5,))]
        await asyncio.sleep(0)
        it.engine.open_gate.set()
        assert await first == rows(1)
        assert [await other for other in others] == [rows(2, 3), rows(4), rows(5)]
        assert [len(batch) for batch in it.engine.batches] == [1, 4]
        assert [ran.images for ran in it.ran] == [1, 4]
        assert [len(ran.waited) for ran in it.ran] == [1, 3]

    bench(test)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_fail_only_their_own_request(value: float) -> None:
    async def test(it: Bench) -> None:
        it.engine.bad = {4: value}
        it.engine.open_gate.clear()
        first = asyncio.create_task(it.infer(1))
        await it.entered()
        before, broken, after = (
            asyncio.create_task(it.infer(*values)) for values in ((2,), (3, 4), (5,))
        )
        await asyncio.sleep(0)
        it.engine.open_gate.set()
        assert [await first, await before, await after] == [rows(1), rows(2), rows(5)]
        with pytest.raises(InferenceFailed, match="not finite"):
            await broken
        assert it.engine.batches == [[1], [2, 3, 4, 5]]
        assert [ran.not_finite for ran in it.ran] == [0, 1]
        with pytest.raises(InferenceFailed):
            await it.infer(*range(11))  # in three pieces, the second of which is broken
        assert not it.batcher.broken

    bench(test)


def test_images_are_joined_in_any_memory_layout() -> None:
    async def test(it: Bench) -> None:
        it.engine.open_gate.clear()
        first = asyncio.create_task(it.infer(1))
        await it.entered()
        backwards = it.batcher.submit(numbered(2, 3)[::-1])
        other = asyncio.create_task(it.infer(4))
        await asyncio.sleep(0)
        it.engine.open_gate.set()
        assert (await it.batcher.infer(backwards)).tolist() == rows(3, 2)
        assert [await first, await other] == [rows(1), rows(4)]
        assert it.engine.batches == [[1], [3, 2, 4]]

    bench(test)


def test_a_large_request_is_split_and_joined() -> None:
    async def test(it: Bench) -> None:
        values = range(11)
        assert await it.infer(*values) == rows(*values)
        assert [len(batch) for batch in it.engine.batches] == [4, 4, 3]

    bench(test)


def test_several_engines_work_on_one_request() -> None:
    async def test(it: Bench) -> None:
        values = range(40)
        assert await it.infer(*values) == rows(*values)

    engines = bench(test, engines=3)
    seen = [value for engine in engines for batch in engine.batches for value in batch]
    assert sorted(seen) == list(range(40))


def test_a_full_queue_rejects_at_once_with_retry_after() -> None:
    async def test(it: Bench) -> None:
        it.engine.open_gate.clear()
        tasks = [asyncio.create_task(it.infer(1))]
        await it.entered()
        tasks += [asyncio.create_task(it.infer(2, 3)), asyncio.create_task(it.infer(4))]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="3 images are waiting, and 3 may") as caught:
            it.batcher.submit(numbered(5))
        assert (caught.value.status, caught.value.retry_after) == (503, 1)
        it.engine.open_gate.set()
        assert [await task for task in tasks] == [rows(1), rows(2, 3), rows(4)]
        assert await it.infer(5) == rows(5)

    bench(test, max_queue=3)


def test_a_cancelled_request_leaves_the_queue() -> None:
    async def test(it: Bench) -> None:
        it.engine.open_gate.clear()
        first = asyncio.create_task(it.infer(1))
        await it.entered()
        second = asyncio.create_task(it.infer(2))
        job = it.batcher.submit(numbered(3))
        await asyncio.sleep(0)
        second.cancel()
        it.batcher.cancel(job)
        with pytest.raises(asyncio.CancelledError):
            await second
        with pytest.raises(ApiError, match="went away"):
            await it.batcher.infer(job)
        assert it.batcher.queue.images == 0
        it.engine.open_gate.set()
        assert await first == rows(1)
        assert await it.infer(4) == rows(4)
        assert it.engine.batches == [[1], [4]]

    bench(test)


def test_a_request_cancelled_while_it_runs_affects_no_other() -> None:
    async def test(it: Bench) -> None:
        it.engine.open_gate.clear()
        job = it.batcher.submit(numbered(1))
        other = asyncio.create_task(it.infer(2))
        await it.entered()
        it.batcher.cancel(job)
        with pytest.raises(ApiError):
            await it.batcher.infer(job)
        it.engine.open_gate.set()
        assert await other == rows(2)

    bench(test)


def test_a_timeout_in_the_queue_and_in_the_engine() -> None:
    async def test(it: Bench) -> None:
        it.engine.open_gate.clear()
        running = asyncio.create_task(it.infer(1, timeout=0.01))
        await it.entered()
        waiting = asyncio.create_task(it.infer(2, timeout=0.01))
        for task in (running, waiting):
            with pytest.raises(ApiError, match="no answer within") as caught:
                await task
            assert (caught.value.status, caught.value.reason) == (503, "deadline")
        assert it.batcher.queue.images == 0
        it.engine.open_gate.set()
        assert await it.infer(3, timeout=60) == rows(3)
        assert it.engine.batches == [[1], [3]]

    bench(test)


def test_an_engine_error_fails_only_its_batch() -> None:
    async def test(it: Bench) -> None:
        it.engine.fails = True
        for _ in range(2):
            with pytest.raises(InferenceFailed) as caught:
                await it.infer(1, 2, 3, 4)
            assert "/dev" not in str(caught.value)
        assert it.batcher.queue.images == 0
        assert not it.batcher.broken
        it.engine.fails = False
        assert await it.infer(6) == rows(6)
        assert [ran.failed is None for ran in it.ran][-1]

    bench(test)


def test_an_engine_that_fails_repeatedly_is_broken() -> None:
    async def test(it: Bench) -> None:
        it.engine.fails = True
        for _ in range(3):
            assert not it.batcher.broken
            with pytest.raises(InferenceFailed):
                await it.infer(1)
        assert it.batcher.broken
        it.engine.fails = False
        await it.infer(1)
        assert not it.batcher.broken

    bench(test)


def test_accepted_requests_are_answered_on_close() -> None:
    engine = FakeEngine()

    async def test() -> None:
        it = Bench([engine])
        engine.open_gate.clear()
        tasks = [asyncio.create_task(it.infer(*range(9)))]
        await it.entered()
        tasks.append(asyncio.create_task(it.infer(9)))
        await asyncio.sleep(0)
        it.batcher.close()
        engine.open_gate.set()
        await it.batcher.join()
        assert [await task for task in tasks] == [rows(*range(9)), rows(9)]

    asyncio.run(test())
