"""The bounded queue between the event loop and the engines' threads.

Counted in images. Who takes a batch gets a fair part of every waiting request: a request of a
thousand images does not hold up those of one image that came after it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from eps_deploy.engines.base import Images, Logits


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
