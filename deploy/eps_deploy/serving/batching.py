"""Dynamic batching: one bounded queue, and a thread for each engine that empties it.

`submit`, `infer` and the delivery of answers belong to the event loop; only the engines run on the
threads.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue

import numpy as np

from eps_deploy.engines.base import Engine, Images, Logits, finite_rows
from eps_deploy.serving.protocol import ApiError, InferenceFailed, busy


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """Options of batching.

    Attributes:
        max_queue: images that may wait.
        max_delay: seconds that an image may wait for others while an engine is free.
        merge: whether images of several requests go into one batch.
        instances: engines, each with a thread of its own; None: 2 for TensorRT, 1 otherwise.
    """

    max_queue: int = 256
    max_delay: float = 0.0
    merge: bool = True
    instances: int | None = None


# -- The queue between the event loop and the engines' threads
#
# Its limit counts images. A batch takes a fair part of every waiting request: a request of a
# thousand images does not delay those of one image that came after it.


@dataclass(eq=False, slots=True)
class Job:
    """The images of one request, from the queue to their logits.

    Attributes:
        images: uint8 `[N, C, H, W]`.
        answer: receives the logits, float32 `[N, classes]`.
        arrived, begun: `time.perf_counter` when it was put into the queue, and when its first
            images were taken out; 0.0: not yet.
        taken: images that are out of the queue.
        done: images whose logits are in `logits`.
    """

    images: Images
    answer: asyncio.Future[Logits]
    arrived: float = field(default_factory=time.perf_counter)
    begun: float = 0.0
    taken: int = 0
    done: int = 0
    logits: Logits | None = None

    @property
    def waiting(self) -> int:
        return len(self.images) - self.taken

    def receive(self, start: int, stop: int, rows: Logits) -> None:
        """Store the logits of images `start` to `stop`; the last ones complete the answer."""
        if len(rows) == len(self.images):
            self.answer.set_result(rows)  # the whole request in one piece, which is what most are
            return
        if self.logits is None:
            self.logits = np.empty((len(self.images), rows.shape[1]), dtype=np.float32)
        self.logits[start:stop] = rows
        self.done += len(rows)
        if self.done == len(self.images):
            self.answer.set_result(self.logits)


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
    """Bounded queue of jobs, emptied in batches of up to `max_batch` images; thread-safe."""

    def __init__(self, options: Batching, max_batch: int) -> None:
        self.limit = options.max_queue
        self._merge = options.merge
        self._max_batch = max_batch
        self._max_delay = options.max_delay if options.merge else 0.0
        self._gap = max_batch if options.merge else 1  # images, of the smallest under an overload
        self._changed = threading.Condition(threading.Lock())
        self._jobs: deque[Job] = deque()
        self.images = 0  # that are waiting
        self._untouched = 0  # jobs of which nothing was taken yet
        self._closed = False

    def put(self, job: Job) -> bool:
        """Append the job; False: there is no room for it.

        A job needs no more room than the smallest batch frees: while small jobs fill every gap at
        once there is never more, and a large one would never be accepted. So up to `limit` images
        and the rest of one job are waiting.
        """
        with self._changed:
            assert not self._closed
            if self.images + min(len(job.images), self._gap) > self.limit:
                return False
            self._jobs.append(job)
            self.images += len(job.images)
            self._untouched += 1
            self._changed.notify()
        return True

    def drop(self, job: Job) -> None:
        """Remove what is still waiting of the job, if anything."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                self.images -= job.waiting
                self._untouched -= not job.taken

    def take(self) -> list[Piece]:
        """Wait for the next batch. Empty when the queue is closed and nothing is left."""
        with self._changed:
            while True:
                if not self._jobs:
                    if self._closed:
                        return []
                    self._changed.wait()
                elif (seconds := self._delay()) > 0:
                    self._changed.wait(seconds)
                else:
                    return self._pick()

    def close(self) -> None:
        """Accept no more jobs; what is waiting is still taken out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _delay(self) -> float:
        """Seconds to wait for more images."""
        if not self._max_delay or self._closed or self.images >= self._max_batch:
            return 0.0
        return self._jobs[0].arrived + self._max_delay - time.perf_counter()

    def _pick(self) -> list[Piece]:
        now = time.perf_counter()
        pieces = []
        for job, share in self._shares():
            self._untouched -= not job.taken
            pieces.append(Piece(job, job.taken, job.taken + share))
            job.begun = job.begun or now
            job.taken += share
            self.images -= share
            if job.waiting:
                self._jobs.append(job)  # the others' turn first
        if self._jobs:
            self._changed.notify()  # another engine may be free
        return pieces

    def _shares(self) -> list[tuple[Job, int]]:
        """Remove the jobs of the next batch; return them with their numbers of images in it.

        The oldest job has at least half of the batch, so that what was accepted is done within
        twice the time that the whole queue takes. The others take turns and share the rest evenly.
        """
        jobs, room = self._jobs, self._max_batch
        if self.images == len(jobs) == self._untouched and self._merge:
            # The usual case: one image each, and none had a turn already.
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
    """Max-min fair shares of `room`: none grows while a smaller one wants more."""
    shares = [0] * len(wanted)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for position, index in enumerate(order):
        shares[index] = min(wanted[index], room // (len(wanted) - position))
        room -= shares[index]
    return shares


# -- The batcher

_MAX_FAILURES = 3  # batches in a row that fail; more, and the cause is not the batch
_SMOOTHING = 0.2  # weight of the last batch in the mean time of an image


@dataclass(frozen=True, slots=True)
class BatchStats:
    """A batch that ran, for metrics.

    `seconds` are the engine's, `waited` those in the queue of each job that began with this batch.
    Where some images' logits are not finite, only their requests failed.
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
        observe: called with every batch, on the event loop.
        after: called with the images and logits of every batch once its answers are on their way;
            on an engine's thread, so it must be quick.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        options: Batching,
        observe: Callable[[BatchStats], None],
        after: Callable[[Images, Logits], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._observe = observe
        self._after = after
        self._failures = 0
        self._seconds_per_image = 0.0
        self.queue = Queue(options, min(engine.max_batch for engine in engines))
        self._threads = [
            threading.Thread(
                target=self._work, args=(engine,), name=f"eps-engine-{index}", daemon=True
            )
            for index, engine in enumerate(engines)
        ]
        self._results: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._courier = threading.Thread(target=self._carry, name="eps-courier", daemon=True)
        for thread in (self._courier, *self._threads):
            thread.start()

    @property
    def broken(self) -> bool:
        """Whether the last batches all failed, so that the engine will not recover by itself."""
        return self._failures >= _MAX_FAILURES

    def submit(self, images: Images) -> Job:
        """Queue the images; `Job.answer` receives their logits, or InferenceFailed.

        Raises ApiError (503) at once when the queue has no room for them.
        """
        job = Job(images, self._loop.create_future())
        if not self.queue.put(job):
            raise self.queue_full()
        return job

    def queue_full(self) -> ApiError:
        """The error for a request for which the queue has no room."""
        empty_in = self.queue.images * self._seconds_per_image / len(self._threads)
        return busy(
            f"{self.queue.images} images are waiting, and {self.queue.limit} may",
            reason="queue-full",
            retry_after=max(1, min(math.ceil(empty_in), 60)),  # HTTP has whole seconds
        )

    def cancel(self, job: Job) -> None:
        """Drop a job whose client went away; what an engine has of it is discarded."""
        self._fail(job, ApiError("the client went away", status=499, reason="disconnected"))

    async def infer(self, job: Job, timeout: float | None = None) -> Logits:
        """Wait for the logits of a job; cancelling this cancels the job.

        Raises ApiError after `timeout` seconds, InferenceFailed when the engine failed.
        """
        timer = None
        if timeout is not None:
            late = ApiError("no answer within the timeout", status=503, reason="deadline")
            timer = self._loop.call_later(timeout, self._fail, job, late)
        try:
            return await job.answer
        except asyncio.CancelledError:
            self.queue.drop(job)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        """Accept no more jobs; those in the queue are still answered."""
        self.queue.close()

    async def join(self) -> None:
        """Wait until all jobs are answered and the threads have ended."""
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._results.put(None)
        await asyncio.to_thread(self._courier.join)

    def _fail(self, job: Job, error: Exception) -> None:
        self.queue.drop(job)
        if not job.answer.done():
            job.answer.set_exception(error)

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
            seconds = time.perf_counter() - began
            self._results.put(partial(self._deliver, pieces, logits, failed, seconds))
            if logits is not None and self._after is not None:
                self._after(batch, logits)

    def _carry(self) -> None:
        """The thread that hands results to the event loop, so that no engine waits for it.

        Waking the loop writes to a socket, and Python releases the GIL for that: the loop takes it,
        and the thread that woke it is blocked while the loop sends answers. A put into a
        SimpleQueue releases nothing, so the engine starts on the next batch before that.
        """
        while (result := self._results.get()) is not None:
            try:
                self._loop.call_soon_threadsafe(result)
            except RuntimeError:  # the loop is closed: the process ends at once
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
            else:
                job.receive(piece.start, piece.stop, logits[at : at + size])
            at += size
        self._failures = self._failures + 1 if failed else 0
        self._seconds_per_image += _SMOOTHING * (seconds / at - self._seconds_per_image)
        begun = [piece.job for piece in pieces if piece.start == 0]
        waited = tuple(job.begun - job.arrived for job in begun)
        not_finite = 0 if finite is None else int(np.count_nonzero(~finite))
        self._observe(BatchStats(at, seconds, waited, failed, not_finite))


def _joined(pieces: Sequence[Piece]) -> Images:
    """The images of all pieces, in one array.

    numpy.concatenate releases the GIL for each of them, and a busy event loop takes it each time.
    """
    first = pieces[0].images
    if len(pieces) == 1:
        return first
    pixels = b"".join(np.ascontiguousarray(piece.images).data for piece in pieces)
    return np.frombuffer(pixels, dtype=np.uint8).reshape(-1, *first.shape[1:])
