"""From requests to batches and back: one queue, and for each engine one thread that empties it.

`submit`, `infer` and the delivery of answers belong to the event loop; only the engine runs on
the threads.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np

from eps_deploy.engines.base import Engine, Images, Logits, finite_rows
from eps_deploy.serving.protocol import ApiError, InferenceFailed, busy

# -- The bounded queue between the event loop and the engines' threads
#
# Counted in images. Who takes a batch gets a fair part of every waiting request: a request of a
# thousand images does not hold up those of one image that came after it.


@dataclass(eq=False, slots=True)
class Job:
    """The images of one request on their way through the engine.

    Attributes:
        images: uint8 `[N, C, H, W]`.
        answer: gets the logits float32 `[N, classes]`.
        arrived: `time.perf_counter` when it was put into the queue.
        begun: when its first images were taken out; 0.0: not yet.
        taken: images that are out of the queue.
        left: images whose logits are still to come.
        logits: of the pieces that are done; None: of none.
    """

    images: Images
    answer: asyncio.Future[Logits]
    arrived: float = field(default_factory=time.perf_counter)
    begun: float = 0.0
    taken: int = 0
    left: int = field(init=False)
    logits: Logits | None = None

    def __post_init__(self) -> None:
        self.left = len(self.images)

    @property
    def waiting(self) -> int:
        return len(self.images) - self.taken

    def receive(self, start: int, stop: int, rows: Logits) -> bool:
        """Take the logits of images `start` to `stop`; whether they were the last ones."""
        self.left -= stop - start
        if self.logits is None:
            if self.left == 0:
                self.logits = rows  # the whole request in one piece, which is what most are
                return True
            self.logits = np.empty((len(self.images), rows.shape[1]), dtype=np.float32)
        self.logits[start:stop] = rows
        return self.left == 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Images `start` to `stop` of a job, to be run in one batch."""

    job: Job
    start: int
    stop: int

    @property
    def images(self) -> Images:
        return self.job.images[self.start : self.stop]


class Queue:
    """Jobs on one side, batches on the other; any thread may call it.

    Args:
        limit: images that may wait.
        max_batch: images that a batch holds at most.
        max_delay: seconds that an image may wait for others while an engine is free.
        merge: whether images of several jobs go into one batch.
    """

    def __init__(self, *, limit: int, max_batch: int, max_delay: float, merge: bool) -> None:
        self.limit = limit
        self._max_batch = max_batch
        self._max_delay = max_delay if merge else 0.0
        self._merge = merge
        self._gap = max_batch if merge else 1  # images, of the smallest batch under an overload
        self._changed = threading.Condition(threading.Lock())
        self._jobs: deque[Job] = deque()
        self._images = 0
        self._untouched = 0  # jobs of which nothing was taken yet
        self._closed = False

    @property
    def images(self) -> int:
        """How many are waiting now."""
        return self._images

    def put(self, job: Job) -> bool:
        """Whether there was room for the job.

        It needs no more than a batch leaves when it is taken out: as long as small jobs fill every
        gap at once there is never more, and a large one would never get in. So up to `limit` and
        the rest of one job are waiting.
        """
        with self._changed:
            assert not self._closed
            if self._images + min(len(job.images), self._gap) > self.limit:
                return False
            self._jobs.append(job)
            self._images += len(job.images)
            self._untouched += 1
            self._changed.notify()
        return True

    def drop(self, job: Job) -> None:
        """What is still waiting of the job, if anything, leaves the queue."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                self._images -= job.waiting
                self._untouched -= not job.taken

    def take(self) -> list[Piece]:
        """The next batch; waits for one. Empty when the queue is closed and nothing is left."""
        with self._changed:
            while True:
                if not self._jobs:
                    if self._closed:
                        return []
                    self._changed.wait()
                elif (patience := self._patience()) > 0:
                    self._changed.wait(patience)
                else:
                    return self._pick()

    def close(self) -> None:
        """Nothing more is put in; what is there is still taken out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _patience(self) -> float:
        """Seconds for which it is still worth to wait for more images."""
        if not self._max_delay or self._closed or self._images >= self._max_batch:
            return 0.0
        return self._jobs[0].arrived + self._max_delay - time.perf_counter()

    def _pick(self) -> list[Piece]:
        now = time.perf_counter()
        pieces = []
        shares = self._shares()
        for job, share in shares:
            self._untouched -= not job.taken
            pieces.append(Piece(job, job.taken, job.taken + share))
            job.begun = job.begun or now
            job.taken += share
            self._images -= share
            if job.waiting:
                self._jobs.append(job)  # the others' turn first
        if self._jobs:
            self._changed.notify()  # there may be a free engine more
        return pieces

    def _shares(self) -> list[tuple[Job, int]]:
        """Who gets how much of the next batch; these jobs are taken out.

        The oldest gets half of it at least, so that what was accepted is done within twice the
        time that the whole queue takes. The others, who take turns, share the rest evenly.
        """
        jobs, room = self._jobs, self._max_batch
        if self._images == len(jobs) == self._untouched and self._merge:
            # One image each, and none had a turn already: what nearly always waits.
            return [(jobs.popleft(), 1) for _ in range(min(room, len(jobs)))]
        oldest = min(jobs, key=lambda job: job.arrived)
        jobs.remove(oldest)
        if not self._merge:
            return [(oldest, min(oldest.waiting, room))]
        others = [jobs.popleft() for _ in range(min(room // 2, len(jobs)))]
        wanted = [job.waiting for job in others]
        first = min(oldest.waiting, max(room - sum(wanted), (room + 1) // 2))
        shares = [(oldest, first), *zip(others, _fair(wanted, room - first), strict=True)]
        jobs.extendleft(job for job, share in reversed(shares) if not share)
        return [(job, share) for job, share in shares if share]


def _fair(wanted: list[int], room: int) -> list[int]:
    """Max-min fair: nobody gets more as long as another one who gets less wants more."""
    shares = [0] * len(wanted)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for position, index in enumerate(order):
        shares[index] = min(wanted[index], room // (len(wanted) - position))
        room -= shares[index]
    return shares


_TOO_MANY_FAILURES = 3  # batches in a row: then it is not the batch
_SMOOTHING = 0.2

_Result = tuple[list[Piece], Logits | None, Exception | None, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """How requests become batches.

    Attributes:
        max_queue: images that may wait.
        max_delay: seconds that an image may wait for others while an engine is free.
        merge: whether images of several requests go into one batch.
        instances: engines, each with a thread of its own.
    """

    max_queue: int = 256
    max_delay: float = 0.0
    merge: bool = True
    instances: int = 1


@dataclass(frozen=True, slots=True)
class Ran:
    """One batch that ran: for metrics.

    Attributes:
        images: in the batch.
        seconds: of the engine.
        waited: seconds in the queue, of each job that began with this batch.
        failed: why it did not work; None: it did.
        not_finite: images whose logits are not finite: their requests failed, the others did not.
    """

    images: int
    seconds: float
    waited: tuple[float, ...]
    failed: Exception | None = None
    not_finite: int = 0


class Batcher:
    """Runs images on engines, in batches; make, use and close it on the event loop.

    Args:
        engines: one thread is started for each; they are not closed here.
        options: see :class:`Batching`.
        observe: told of every batch, on the event loop.
        after: gets every batch that ran, with its logits, when its answers are on their way; on an
            engine's thread, so it must be quick.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        options: Batching,
        observe: Callable[[Ran], None],
        after: Callable[[Images, Logits], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._observe = observe
        self._after = after
        self._failures = 0
        self._seconds_per_image = 0.0
        self._engines = len(engines)
        self.queue = Queue(
            limit=options.max_queue,
            max_batch=min(engine.max_batch for engine in engines),
            max_delay=options.max_delay,
            merge=options.merge,
        )
        self._threads = [
            threading.Thread(
                target=self._work, args=(engine,), name=f"eps-engine-{index}", daemon=True
            )
            for index, engine in enumerate(engines)
        ]
        self._results: SimpleQueue[_Result | None] = SimpleQueue()
        self._courier = threading.Thread(target=self._carry, name="eps-courier", daemon=True)
        for thread in (self._courier, *self._threads):
            thread.start()

    @property
    def broken(self) -> bool:
        """Whether the engine has failed so often that it will not recover by itself."""
        return self._failures >= _TOO_MANY_FAILURES

    def submit(self, images: Images) -> Job:
        """Put the images into the queue; `Job.answer` gets their logits, or InferenceFailed.

        Raises Refusal, at once, when the queue has no room for them.
        """
        job = Job(images, self._loop.create_future())
        if not self.queue.put(job):
            raise self.refusal()
        return job

    def refusal(self) -> ApiError:
        """What a request is told for which the queue has no room."""
        return busy(
            f"{self.queue.images} images are waiting, and {self.queue.limit} may",
            reason="queue-full",
            retry_after=self._retry_after(),
        )

    def cancel(self, job: Job) -> None:
        """The client went away: out of the queue; what an engine has of it is thrown away."""
        self._fail(job, ApiError("the client went away", status=499, reason="disconnected"))

    async def infer(self, job: Job, timeout: float | None = None) -> Logits:
        """The logits of a job; when this is cancelled, so is the job.

        Raises Refusal after `timeout` seconds, InferenceFailed when the engine failed.
        """
        timer = None
        if timeout is not None:
            timer = self._loop.call_later(timeout, self._expire, job)
        try:
            return await job.answer
        except asyncio.CancelledError:
            self.queue.drop(job)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        """No job may be submitted any more; those that were are still answered."""
        self.queue.close()

    async def join(self) -> None:
        """Wait until the threads have answered all jobs and ended."""
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._results.put(None)
        await asyncio.to_thread(self._courier.join)

    def _expire(self, job: Job) -> None:
        self._fail(job, ApiError("no answer within the timeout", status=503, reason="deadline"))

    def _fail(self, job: Job, error: Exception) -> None:
        self.queue.drop(job)
        if not job.answer.done():
            job.answer.set_exception(error)

    def _retry_after(self) -> int:
        """Seconds until the queue is likely to be empty; at least 1, which HTTP has as smallest."""
        wait = self.queue.images * self._seconds_per_image / self._engines
        return max(1, min(math.ceil(wait), 60))

    def _work(self, engine: Engine) -> None:
        """The thread of one engine."""
        while pieces := self.queue.take():
            began = time.perf_counter()
            logits: Logits | None = None
            failed: Exception | None = None
            try:
                batch = _joined(pieces)
                logits = engine.infer(batch)
            except Exception as error:  # whatever it is, the requests must be answered
                failed = error
            self._results.put((pieces, logits, failed, time.perf_counter() - began))
            if logits is not None and self._after is not None:
                self._after(batch, logits)

    def _carry(self) -> None:
        """The thread that hands results to the event loop, so that no engine has to wait for it.

        To wake the loop means to write to a socket, and Python lets go of the GIL for that: the
        loop takes it, and whoever woke it stands still while the loop sends answers. A put into a
        SimpleQueue lets go of nothing, so the engine is at work on the next batch before that.
        """
        while (result := self._results.get()) is not None:
            try:
                self._loop.call_soon_threadsafe(self._deliver, *result)
            except RuntimeError:  # the loop is closed: the process was told to end at once
                return

    def _deliver(
        self,
        pieces: list[Piece],
        logits: Logits | None,
        failed: Exception | None,
        seconds: float,
    ) -> None:
        at = 0
        finite = finite_rows(logits) if logits is not None else None
        for piece in pieces:
            job, size = piece.job, piece.stop - piece.start
            if job.answer.done():  # cancelled, expired, or failed with an earlier piece
                pass
            elif logits is None or finite is None:
                self._fail(job, InferenceFailed("the engine failed"))
            elif not finite[at : at + size].all():
                self._fail(job, InferenceFailed("the network's logits are not finite"))
            elif job.receive(piece.start, piece.stop, logits[at : at + size]):
                assert job.logits is not None
                job.answer.set_result(job.logits)
            at += size
        self._failures = self._failures + 1 if failed else 0
        each = seconds / at
        self._seconds_per_image += _SMOOTHING * (each - self._seconds_per_image)
        begun = [piece.job for piece in pieces if piece.start == 0]
        waited = tuple(job.begun - job.arrived for job in begun)
        not_finite = 0 if finite is None else int(np.count_nonzero(~finite))
        self._observe(Ran(at, seconds, waited, failed, not_finite))


def _joined(pieces: Sequence[Piece]) -> Images:
    """The images of all pieces, in one array.

    numpy.concatenate lets go of the GIL for each of them, and a busy event loop takes it each time.
    """
    first = pieces[0].images
    if len(pieces) == 1:
        return first
    pixels = b"".join(np.ascontiguousarray(piece.images).data for piece in pieces)
    return np.frombuffer(pixels, dtype=np.uint8).reshape(-1, *first.shape[1:])
