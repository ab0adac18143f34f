"""A second engine that gets a share of the batches after they were answered, to be compared.

It runs whole batches of the served engine, and times both engines on them, one right after the
other on its own thread: what the served engine took for the answer depends on whether it had just
run before, and is nothing to compare with. Nothing here can hold up or change an answer: what the
second engine has no room for is dropped, and what it fails at is counted.
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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eps_core.errors import ConfigError
from eps_deploy.bundle import ONNX, Bundle, Choice, prove, warm
from eps_deploy.engines.base import Engine, EngineError, Images, Logits
from eps_deploy.serving.model import Model, Say, opener, read_bundle

BASELINE = "baseline.onnx"
_QUEUE = 64  # images that may wait; an empty queue takes a batch of any size
_SEED = 0
_NICENESS = 10
_PATIENCE = 2.0  # seconds for the batch that runs when the server ends


@dataclass(frozen=True, kw_only=True, slots=True)
class Shadowing:
    """What `--shadow` asks for.

    Attributes:
        path: a bundle's folder; None: the unpruned network of the bundle that is served.
        share: of the batches, above 0 and at most 1.
    """

    path: Path | None
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """What became of a batch that was the shadow's: for metrics.

    Attributes:
        outcome: whether both engines answered, there was no room, or the shadow failed.
        images: in the batch.
        disagreed: images of which the two engines' best labels differ.
        seconds: of the shadow's engine.
        served: seconds of the served engine, for the same batch on the same thread.
    """

    outcome: Literal["compared", "dropped", "failed"]
    images: int
    disagreed: int = 0
    seconds: float = 0.0
    served: float = 0.0


def read_shadow(served: Bundle, options: Shadowing, engine_cache: Path | None) -> Bundle:
    """The bundle that the shadow runs from, verified.

    Raises FileFormatError; ConfigError when it takes other images or gives other labels than
    `served`, or when its unpruned network would not run on the same runtime.
    """
    if options.path is None:
        if served.model.endswith(".plan"):
            raise ConfigError(
                f"--shadow baseline: {served.root} is a TensorRT plan, and has none of the unpruned"
                " network; deploy it with --defer-build, and this server builds both"
            )
        if BASELINE not in served.manifest["files"]:
            raise ConfigError(
                f"--shadow baseline: {served.root} has no {BASELINE}; name another bundle"
            )
        return served
    bundle = read_bundle(options.path, engine_cache)
    for what, theirs, ours in (
        ("images of shape", list(bundle.input_shape), list(served.input_shape)),
        ("labels", bundle.labels, served.labels),
    ):
        if theirs != ours:
            raise ConfigError(
                f"--shadow {options.path}: {what} {_short(theirs)}, and {served.root} has"
                f" {_short(ours)}; name a bundle for the same data"
            )
    return bundle


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, list) else ", ".join(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def open_shadow(
    model: Model,
    options: Shadowing,
    *,
    engine_cache: Path | None,
    provider: Choice,
    say: Say,
    stop: threading.Event,
) -> Engine:
    """The shadow's engine, warm, and proven where its bundle says what it must answer.

    Raises as :func:`read_shadow` does; EngineError: it does not run here; ConfigError: the batches
    of `model` are too large for it.
    """
    bundle = read_shadow(model.bundle, options, engine_cache)
    of_its_own = options.path is not None
    file = ONNX if of_its_own else BASELINE
    engine = opener(bundle, engine_cache, provider, say, stop, file)()
    with contextlib.ExitStack() as undo:
        undo.enter_context(engine)
        if engine.max_batch < model.max_batch:
            raise ConfigError(
                f"--shadow {options.path}: takes batches of up to {engine.max_batch}, and"
                f" {model.bundle.root} of up to {model.max_batch}; deploy it with --max-batch"
                f" {model.max_batch}"
            )
        if of_its_own:
            prove(bundle, engine, "shadow")
        else:
            warm(bundle, engine)
        undo.pop_all()
    name = f"the bundle {bundle.manifest['digest'][:12]}" if of_its_own else BASELINE
    say(f"shadow: {name} gets {options.share:g} of the batches")
    return engine


@dataclass(frozen=True, slots=True)
class _Batch:
    images: Images
    top: npt.NDArray[np.intp]


class Shadow:
    """Runs a share of the batches again; make and end it on the event loop.

    Args:
        engine: is closed in the end, by the thread that runs it.
        served: what it is compared with; must stay open until :meth:`end` returned True.
        share: of the batches; which ones is drawn with a fixed seed.
        observe: told of every batch that was drawn, on the event loop.
        say: told, on any thread, that the engine has begun to fail.
    """

    def __init__(
        self,
        engine: Engine,
        served: Engine,
        share: float,
        *,
        observe: Callable[[Compared], None],
        say: Say,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        self._served = served
        self._share = share
        self._observe = observe
        self._say = say
        # Drawn, and not every n-th: clients that take turns would meet it always or never.
        self._draw = random.Random(_SEED)
        self._changed = threading.Condition()
        self._waiting: deque[_Batch] = deque()
        self._images = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="eps-shadow", daemon=True)
        self._thread.start()

    def offer(self, images: Images, logits: Logits) -> None:
        """A batch that the served engine has run, and whose answers are on their way.

        On any thread; takes no longer than a copy of the images.
        """
        with self._changed:
            if self._closed or self._draw.random() >= self._share:
                return
            room = not self._waiting or self._images + len(images) <= _QUEUE
            if room:
                try:
                    # Pixels of one request are a view of its body, which must not stay for them.
                    kept = images if images.flags.owndata else images.copy()
                except MemoryError:  # raised here, it would end the thread of the served engine
                    room = False
                else:
                    self._waiting.append(_Batch(kept, logits.argmax(axis=1)))
                    self._images += len(images)
                    self._changed.notify()
        if not room:
            self._tell(Compared(outcome="dropped", images=len(images)))

    async def end(self) -> bool:
        """Forget what waits and free the engine; False when it is held up in a batch."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, _PATIENCE)
        return not self._thread.is_alive()

    def _take(self) -> _Batch | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            batch = self._waiting.popleft()
            self._images -= len(batch.images)
            return batch

    def _work(self) -> None:
        _be_nice()
        failing = False
        with self._engine as engine:
            while batch := self._take():
                try:
                    served, _ = _timed(self._served, batch.images)
                    seconds, logits = _timed(engine, batch.images)
                    if not np.isfinite(logits).all():
                        raise EngineError("some of its logits are not finite")
                except Exception as error:  # whatever it is, the server goes on
                    if not failing:
                        self._say(f"the shadow fails, and is only counted from now on: {error}")
                    failing = True
                    self._tell(Compared(outcome="failed", images=len(batch.images)))
                    continue
                failing = False
                self._tell(
                    Compared(
                        outcome="compared",
                        images=len(batch.images),
                        disagreed=int(np.count_nonzero(logits.argmax(axis=1) != batch.top)),
                        seconds=seconds,
                        served=served,
                    )
                )

    def _tell(self, compared: Compared) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(self._observe, compared)


def _timed(engine: Engine, images: Images) -> tuple[float, Logits]:
    """Seconds and logits of its second run: in the first, it finds the other one in the caches."""
    engine.infer(images)
    began = time.perf_counter()
    logits = engine.infer(images)
    return time.perf_counter() - began, logits


def _be_nice() -> None:
    """Where cores are short, the served engine's thread goes first. Linux has this by thread."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
