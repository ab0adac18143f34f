"""The served model, and its replacement by another one without losing a request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from eps_core.cli import Log
from eps_core.errors import ConfigError
from eps_deploy.bundle import Bundle
from eps_deploy.engines.base import Engine
from eps_deploy.serving.batching import Batcher, Batching, BatchStats
from eps_deploy.serving.model import Model, ModelSource, open_model, open_shadow, read_bundle
from eps_deploy.serving.protocol import busy
from eps_deploy.serving.shadow import Shadow, ShadowBatch

T = TypeVar("T")


class ServedModel:
    """A model with its batcher, and the requests that use it."""

    def __init__(
        self,
        model: Model,
        batching: Batching,
        observe: Callable[[BatchStats], None],
        shadow: Shadow | None,
    ) -> None:
        self.model = model
        self.signature = model.signature
        self._shadow = shadow
        after = shadow.offer if shadow is not None else None
        self.batcher = Batcher(model.engines, batching, observe, after)
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @contextmanager
    def used(self) -> Iterator[ServedModel]:
        """Keep the engine open during one request."""
        self._users += 1
        self._unused.clear()
        try:
            yield self
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    async def retire(self) -> bool:
        """Answer what is in progress, free the engines; False: the shadow is stuck in a batch."""
        await self._unused.wait()
        self.batcher.close()
        await self.batcher.join()
        if self._shadow is not None and not await self._shadow.end():
            return False
        await asyncio.to_thread(self.model.close)
        return True


class Service:
    """The served model for HTTP and gRPC; everything here belongs to the event loop.

    The name of the model is fixed while the process runs. `observe` is called with every batch and
    `compared` with every batch of the shadow, on the event loop; `log` is called on any thread.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        name: str,
        log: Log,
        observe: Callable[[BatchStats], None],
        compared: Callable[[ShadowBatch], None] = lambda batch: None,
    ) -> None:
        self.name = name
        self.log = log
        self._source = source
        self._observe = observe
        self._compared = compared
        self._current: ServedModel | None = None
        self._loading = False
        self._draining = False
        self._stop = threading.Event()
        self._retiring: set[asyncio.Task[None]] = set()
        self._stuck = False

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self._current is not None and self.live and not self._draining

    @property
    def live(self) -> bool:
        """False when only a new process would help."""
        return self._current is None or not self._current.batcher.broken

    @property
    def queued(self) -> int:
        """Images that are waiting."""
        return self._current.batcher.queue.images if self._current is not None else 0

    @property
    def room(self) -> int:
        """Images for which the queue has room."""
        return self._source.batching.max_queue - self.queued

    @property
    def current(self) -> ServedModel:
        """The model that is served. Raises ApiError (503) before there is one."""
        if self._current is None:
            raise busy("the model is still being loaded", reason="not-ready")
        return self._current

    async def load(self, bundle: Bundle | None = None) -> None:
        """Load the bundle (read from the disk unless given) and serve it from then on.

        The old model serves until the new one is proven, and still answers the requests that it
        has accepted. Raises EpsError or OSError; then nothing has changed.
        """
        if self._loading:
            raise busy("a model is being loaded already", reason="loading")
        self._loading = True
        try:
            model, engine = await _in_thread(lambda: self._open(bundle))
        finally:
            self._loading = False
        before, source, shadow = self._current, self._source, None
        if engine is not None:
            shadow = Shadow(
                engine,
                model.engines[0],
                source.shadow_share,
                observe=self._compared,
                log=self.log,
            )
        self._current = ServedModel(model, source.batching, self._observe, shadow)
        if before is not None:
            task = asyncio.create_task(self._retire(before))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    def drain(self) -> None:
        """Report from now on that the server is not ready; cancel a plan that is being built."""
        self._draining = True
        self._stop.set()

    async def close(self) -> bool:
        """Answer everything that was accepted, then free the engines.

        False when a shadow is stuck in a batch: the process must not wait for its thread.
        """
        self.drain()
        if self._current is not None:
            await self._retire(self._current)
        await asyncio.gather(*self._retiring)
        return not self._stuck

    async def _retire(self, served: ServedModel) -> None:
        if not await served.retire():
            self._stuck = True

    def _open(self, bundle: Bundle | None) -> tuple[Model, Engine | None]:
        """Open the model, and the shadow's engine if there is one."""
        source = self._source
        if bundle is None:
            bundle = read_bundle(source.path, source.engine_cache)
        if bundle.name != self.name:  # clients use the name that they know
            raise ConfigError(
                f"{bundle.root}: its model is called {bundle.name} now, and {self.name} is served;"
                " start the server again"
            )
        model = open_model(bundle, source, log=self.log, stop=self._stop)
        if source.shadow is None:
            return model, None
        try:
            shadow = open_shadow(model, source, source.shadow, log=self.log, stop=self._stop)
        except BaseException:
            model.close()
            raise
        return model, shadow


async def _in_thread(work: Callable[[], T]) -> T:
    """Run `work` on a daemon thread, for which the end of the process does not wait."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from now on it cannot be cancelled

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="eps-load", daemon=True).start()
    return await asyncio.wrap_future(future)
