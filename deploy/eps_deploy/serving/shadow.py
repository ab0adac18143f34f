"""Shadow: a second engine that runs a share of the answered batches, for comparison.

It runs whole batches of the served engine and times both engines on them, one right after the other
on its own thread: the time that the served engine took for the answer depends on whether it had
just run before, so it cannot be compared. The shadow cannot delay or change an answer: batches for
which it has no room are dropped, and batches at which it fails are counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from eps_core.cli import Log
from eps_deploy.engines.base import Engine, EngineError, Images, Logits

_QUEUE = 64  # images that may wait; an empty queue takes a batch of any size
_SEED = 0
_NICENESS = 10
_JOIN_SECONDS = 2.0  # for the batch that runs when the server ends


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowBatch:
    """A batch that was sampled for the shadow, for metrics.

    `disagreed` counts images for which the two engines' best labels differ. `seconds` are of the
    shadow's engine, `served` of the served engine, for the same batch on the same thread.
    """

    outcome: Literal["compared", "dropped", "failed"]
    images: int
    disagreed: int = 0
    seconds: float = 0.0
    served: float = 0.0


class Shadow:
    """Run a share of the batches again; make and end it on the event loop.

    Args:
        engine: the shadow's; closed in the end by the thread that runs it.
        served: the engine to compare with; must stay open until :meth:`end` returned True.
        share: fraction of the batches; they are sampled with a fixed seed.
        observe: called with every sampled batch, on the event loop.
        log: called on any thread when the engine begins to fail.
    """

    def __init__(
        self,
        engine: Engine,
        served: Engine,
        share: float,
        *,
        observe: Callable[[ShadowBatch], None],
        log: Log,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        self._served = served
        self._share = share
        self._observe = observe
        self._log = log
        # Random, not every n-th: clients that take turns would meet it always or never.
        self._random = random.Random(_SEED)
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Images, npt.NDArray[np.intp]]] = deque()  # with best labels
        self._images = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="eps-shadow", daemon=True)
        self._thread.start()

    def offer(self, images: Images, logits: Logits) -> None:
        """Offer a batch that the served engine has run and whose answers are on their way.

        On any thread; takes no longer than a copy of the images.
        """
        with self._changed:
            if self._closed or self._random.random() >= self._share:
                return
            if not self._waiting or self._images + len(images) <= _QUEUE:
                # A MemoryError would end the thread of the served engine.
                with contextlib.suppress(MemoryError):
                    # Pixels of one request are a view of its body, which must not stay for them.
                    kept = images if images.flags.owndata else images.copy()
                    self._waiting.append((kept, logits.argmax(axis=1)))
                    self._images += len(images)
                    self._changed.notify()
                    return
        self._report(ShadowBatch(outcome="dropped", images=len(images)))

    async def end(self) -> bool:
        """Drop what waits and free the engine; False when it is stuck in a batch."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)
        return not self._thread.is_alive()

    def _take(self) -> tuple[Images, npt.NDArray[np.intp]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            images, best = self._waiting.popleft()
            self._images -= len(images)
            return images, best

    def _work(self) -> None:
        _lower_priority()
        failing = False
        with self._engine as engine:
            while batch := self._take():
                images, best = batch
                try:
                    served, _ = _timed(self._served, images)
                    seconds, logits = _timed(engine, images)
                    if not np.isfinite(logits).all():
                        raise EngineError("some of its logits are not finite")
                except Exception as error:  # whatever it is, the server goes on
                    if not failing:
                        self._log(f"the shadow fails, and is only counted from now on: {error}")
                    failing = True
                    self._report(ShadowBatch(outcome="failed", images=len(images)))
                    continue
                failing = False
                self._report(
                    ShadowBatch(
                        outcome="compared",
                        images=len(images),
                        disagreed=int(np.count_nonzero(logits.argmax(axis=1) != best)),
                        seconds=seconds,
                        served=served,
                    )
                )

    def _report(self, compared: ShadowBatch) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(self._observe, compared)


def _timed(engine: Engine, images: Images) -> tuple[float, Logits]:
    """Seconds and logits of the second run; the first finds the other engine's data in cache."""
    engine.infer(images)
    began = time.perf_counter()
    logits = engine.infer(images)
    return time.perf_counter() - began, logits


def _lower_priority() -> None:
    """Let the served engine's thread go first where cores are scarce; per thread on Linux only."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
