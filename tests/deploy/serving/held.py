"""A real server whose engine stands still until it is told to go on."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from eps_deploy.engines.base import Engine, Images, Logits
from eps_deploy.serving import model as model_module
from eps_deploy.serving import service as service_module
from eps_deploy.serving.limits import Limits

from .running import Client, thread


class HeldEngine:
    """Around an engine: `gate` lets its batches through, `entered` tells that one has come."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def infer(self, images: Images) -> Logits:
        self.entered.release()
        assert self.gate.wait(60)
        return self._engine.infer(images)

    def __exit__(self, *args: object) -> None:
        self._engine.__exit__(None, None, None)


@contextmanager
def held(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, *, limits: Limits | None = None, **source: Any
) -> Iterator[tuple[Client, HeldEngine]]:
    """A server on a thread, and its engine, which is held."""
    engines: list[HeldEngine] = []

    def open_model(*args: Any, **options: Any) -> Any:
        model = model_module.open_model(*args, **options)
        engines.append(HeldEngine(model.engines[0]))
        return dataclasses.replace(model, engines=(engines[-1],))

    monkeypatch.setattr(service_module, "open_model", open_model)
    with thread(bundle, limits=limits or Limits(), **source) as client:
        try:
            yield client, engines[0]
        finally:
            engines[0].gate.set()
