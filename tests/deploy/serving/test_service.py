"""The served model: ready only when proven, replaced and closed without losing a request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eps_deploy.bundle import Bundle, load_bundle
from eps_deploy.engines.base import EngineError
from eps_deploy.serving import service as service_module
from eps_deploy.serving.batching import Batching, BatchStats
from eps_deploy.serving.model import Model, ModelSource
from eps_deploy.serving.protocol import ApiError, InferenceFailed, Signature
from eps_deploy.serving.service import Service
from tests.deploy.serving.engines import SHAPE, FakeEngine, numbered


class Loader:
    """Stands in for `open_model`: each load gives the next of these engines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
        self.engines = [FakeEngine() for _ in range(3)]
        self.loads = 0
        self.fails = False
        self._bundle = bundle
        monkeypatch.setattr(service_module, "open_model", self.open)

    def open(self, bundle: Bundle, source: ModelSource, **_: Any) -> Model:
        if self.fails:
            raise EngineError("does not run")
        engine = self.engines[self.loads]
        self.loads += 1
        signature = Signature(
            name="m",
            version="1",
            input_shape=SHAPE,
            labels=("a", "b"),
            max_images=source.batching.max_queue,
        )
        return Model(bundle=bundle, engines=(engine,), signature=signature, card={})


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch, deployed: Path) -> Loader:
    return Loader(monkeypatch, load_bundle(deployed / "bundle"))


def serve(deployed: Path, test: Callable[[Service], Awaitable[None]]) -> list[BatchStats]:
    """Run a test on a service; all threads must have ended after it."""
    ran: list[BatchStats] = []

    async def body() -> None:
        source = ModelSource(path=deployed / "bundle", batching=Batching())
        service = Service(source, name="eps_resnet", log=lambda line: None, observe=ran.append)
        await asyncio.wait_for(test(service), 60)
        await asyncio.wait_for(service.close(), 60)
        assert not service.ready

    asyncio.run(body())
    return ran


async def ask(service: Service, *values: int) -> list[float]:
    with service.current.used() as served:
        job = served.batcher.submit(numbered(*values))
        logits = await served.batcher.infer(job)
    return [float(value) for value in logits[:, 0]]


def test_it_is_ready_when_the_model_is_loaded(deployed: Path, loader: Loader) -> None:
    async def test(service: Service) -> None:
        assert service.live
        assert not service.ready
        with pytest.raises(ApiError, match="still being loaded") as caught:
            assert service.current
        assert caught.value.status == 503
        await service.load()
        assert service.ready
        assert await ask(service, 1, 2) == [1, 2]

    assert [entry.images for entry in serve(deployed, test)] == [2]
    assert loader.engines[0].closed


def test_a_new_model_takes_over_and_the_old_one_finishes(deployed: Path, loader: Loader) -> None:
    async def test(service: Service) -> None:
        await service.load()
        old, new = loader.engines[:2]
        old.open_gate.clear()
        before = [
            asyncio.create_task(ask(service, *range(6))),
            asyncio.create_task(ask(service, 7)),
        ]
        await asyncio.to_thread(old.entered.acquire)
        await service.load()
        assert await ask(service, 8) == [8]
        assert new.batches == [[8]]
        assert not old.closed
        old.open_gate.set()
        assert [await task for task in before] == [[0, 1, 2, 3, 4, 5], [7]]
        while not old.closed:
            await asyncio.sleep(0.001)
        assert not new.closed

    serve(deployed, test)
    assert loader.engines[1].closed


def test_a_model_that_does_not_load_changes_nothing(deployed: Path, loader: Loader) -> None:
    async def test(service: Service) -> None:
        await service.load()
        loader.fails = True
        with pytest.raises(EngineError, match="does not run"):
            await service.load()
        assert service.ready
        assert await ask(service, 3) == [3]

    serve(deployed, test)


def test_one_load_at_a_time(deployed: Path, loader: Loader) -> None:
    async def test(service: Service) -> None:
        first = asyncio.create_task(service.load())
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="being loaded already"):
            await service.load()
        await first
        assert loader.loads == 1

    serve(deployed, test)


def test_a_broken_engine_is_reported_by_the_probes(deployed: Path, loader: Loader) -> None:
    """Then the probes fail, and whoever watches starts another process."""

    async def test(service: Service) -> None:
        await service.load()
        loader.engines[0].fails = True
        for _ in range(3):
            assert service.live
            with pytest.raises(InferenceFailed):
                await ask(service, 1)
        assert not service.live
        assert not service.ready
        await service.load()  # a new engine helps as well
        assert service.live
        assert await ask(service, 2) == [2]

    serve(deployed, test)


def test_a_bundle_is_loaded_and_proven_with_a_model_card(deployed: Path) -> None:
    said: list[str] = []

    async def body() -> None:
        source = ModelSource(path=deployed / "bundle", batching=Batching(instances=2))
        service = Service(source, name="eps_resnet", log=said.append, observe=lambda ran: None)
        await service.load()
        served = service.current
        assert len(served.model.engines) == 2
        assert served.model.card["proof"]["difference"] < 1e-5
        images = np.zeros((70, *served.signature.input_shape), dtype=np.uint8)
        with served.used():
            assert (await served.batcher.infer(served.batcher.submit(images))).shape == (70, 10)
        await service.close()

    asyncio.run(body())
    assert any(line.startswith("warm: ") for line in said)
