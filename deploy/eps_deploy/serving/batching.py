"""From requests to batches and back: one queue, and for each engine one thread that empties it.

`submit`, `infer` and the delivery of answers belong to the event loop; only the engine runs on
the threads.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from eps_deploy.engines.base import Engine, Images, Logits, finite_rows
from eps_deploy.serving.queueing import Job, Piece, Queue
from eps_deploy.serving.refusals import InferenceFailed, Refusal, busy

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

    def refusal(self) -> Refusal:
        """What a request is told for which the queue has no room."""
        return busy(
            f"{self.queue.images} images are waiting, and {self.queue.limit} may",
            reason="queue-full",
            retry_after=self._retry_after(),
        )

    def cancel(self, job: Job) -> None:
        """The client went away: out of the queue; what an engine has of it is thrown away."""
        self._fail(job, Refusal("the client went away", status=499, reason="disconnected"))

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
        self._fail(job, Refusal("no answer within the timeout", status=503, reason="deadline"))

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
