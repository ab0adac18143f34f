"""The queue: bounded, fair, and its delay."""

from __future__ import annotations

import asyncio
import threading

import numpy as np

from eps_deploy.serving.batching import Batching, Job, Piece, Queue
from tests.deploy.serving.engines import numbered


class Shop:
    """A queue, and jobs by the number of their images."""

    def __init__(
        self, *, limit: int = 100, max_batch: int = 4, max_delay: float = 0.0, merge: bool = True
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.close()  # nobody waits for an answer here
        options = Batching(max_queue=limit, max_delay=max_delay, merge=merge)
        self.queue = Queue(options, max_batch)

    def job(self, size: int) -> Job:
        return Job(numbered(*[0] * size), asyncio.Future(loop=self._loop))

    def put(self, size: int) -> Job:
        job = self.job(size)
        assert self.queue.put(job)
        return job


def told(pieces: list[Piece], *jobs: Job) -> list[tuple[int, int, int]]:
    """Which images of which job are in a batch."""
    return [(jobs.index(piece.job), piece.start, piece.stop) for piece in pieces]


def test_jobs_share_a_batch_in_order() -> None:
    shop = Shop()
    jobs = [shop.put(1) for _ in range(6)]
    assert told(shop.queue.take(), *jobs) == [(index, 0, 1) for index in range(4)]
    assert told(shop.queue.take(), *jobs) == [(index, 0, 1) for index in (4, 5)]
    assert shop.queue.images == 0


def test_a_large_job_is_split() -> None:
    shop = Shop()
    job = shop.put(10)
    batches = [told(shop.queue.take(), job) for _ in range(3)]
    assert batches == [[(0, 0, 4)], [(0, 4, 8)], [(0, 8, 10)]]


def test_small_jobs_do_not_wait_for_a_large_one() -> None:
    shop = Shop(max_batch=8)
    large = shop.put(50)
    shop.queue.take()
    small = [shop.put(1) for _ in range(3)]
    assert told(shop.queue.take(), large, *small) == [(0, 8, 13), (1, 0, 1), (2, 0, 1), (3, 0, 1)]


def test_a_job_is_done_within_twice_the_time_of_the_queue() -> None:
    """However many come after it, and whatever their size."""
    for size in (1, 3, 40):
        shop = Shop(max_batch=4, limit=100)
        before = [shop.put(30), shop.put(20)]
        job = shop.put(40)
        batches = 0
        while job.waiting:
            while shop.queue.put(shop.job(size)):
                pass
            shop.queue.take()
            batches += 1
        assert batches <= 2 * 90 / 4
        assert not any(other.waiting for other in before)


def test_large_jobs_take_turns_beside_the_oldest() -> None:
    shop = Shop(max_batch=4)
    jobs = [shop.put(20) for _ in range(5)]
    batches = [told(shop.queue.take(), *jobs) for _ in range(2)]
    assert batches == [
        [(0, 0, 2), (1, 0, 1), (2, 0, 1)],
        [(0, 2, 4), (3, 0, 1), (4, 0, 1)],
    ]


def test_unused_shares_go_to_the_others() -> None:
    shop = Shop(max_batch=16)
    jobs = [shop.put(size) for size in (2, 20, 1, 20)]
    taken = {index: stop - start for index, start, stop in told(shop.queue.take(), *jobs)}
    assert (taken[0], taken[2]) == (2, 1)
    assert sorted((taken[1], taken[3])) == [6, 7]


def test_a_largest_batch_of_one() -> None:
    shop = Shop(max_batch=1)
    jobs = [shop.put(2), shop.put(2)]
    batches = [told(shop.queue.take(), *jobs) for _ in range(4)]
    assert batches == [[(0, 0, 1)], [(0, 1, 2)], [(1, 0, 1)], [(1, 1, 2)]]


def test_a_batch_is_never_larger_than_the_largest() -> None:
    draw = np.random.default_rng(0)
    shop = Shop(max_batch=7, limit=10_000)
    jobs = [shop.put(int(size)) for size in draw.integers(1, 30, 60)]
    seen = {id(job): 0 for job in jobs}
    while shop.queue.images:
        pieces = shop.queue.take()
        assert 1 <= sum(piece.stop - piece.start for piece in pieces) <= 7
        for piece in pieces:  # every image once, and in order
            assert piece.start == seen[id(piece.job)]
            seen[id(piece.job)] = piece.stop
    assert [seen[id(job)] for job in jobs] == [len(job.images) for job in jobs]


def test_a_full_queue_accepts_nothing() -> None:
    shop = Shop(limit=5)
    shop.put(3)
    assert not shop.queue.put(shop.job(3))
    shop.put(2)
    assert not shop.queue.put(shop.job(1))
    shop.queue.take()
    shop.put(4)


def test_a_dropped_job_is_not_run() -> None:
    shop = Shop()
    jobs = [shop.put(1), shop.put(9), shop.put(1)]
    shop.queue.take()
    shop.queue.drop(jobs[1])
    shop.queue.drop(jobs[0])  # is not in there any more
    assert shop.queue.images == 0
    last = shop.put(2)
    assert told(shop.queue.take(), last) == [(0, 0, 2)]


def test_no_merging() -> None:
    shop = Shop(merge=False, max_delay=60)
    jobs = [shop.put(1), shop.put(6), shop.put(1)]
    batches = [told(shop.queue.take(), *jobs) for _ in range(4)]
    assert batches == [[(0, 0, 1)], [(1, 0, 4)], [(1, 4, 6)], [(2, 0, 1)]]


def test_a_full_batch_does_not_wait_for_more() -> None:
    shop = Shop(max_delay=60)
    for _ in range(3):
        shop.put(1)
    taken: list[list[Piece]] = []
    thread = threading.Thread(target=lambda: taken.append(shop.queue.take()))
    thread.start()
    shop.put(1)
    thread.join(30)
    assert [len(pieces) for pieces in taken] == [4]


def test_max_delay() -> None:
    shop = Shop(max_delay=0.01)
    job = shop.put(1)
    assert told(shop.queue.take(), job) == [(0, 0, 1)]
    assert job.begun - job.arrived >= 0.01


def test_a_closed_queue_is_emptied_at_once() -> None:
    shop = Shop(max_delay=60)
    job = shop.put(1)
    shop.queue.close()
    assert told(shop.queue.take(), job) == [(0, 0, 1)]
    assert shop.queue.take() == []
    assert shop.queue.take() == []
