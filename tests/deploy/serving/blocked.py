"""A real server on a thread whose engine is blocked until it is released."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from eps_deploy.engines.base import Engine, Images, Logits
from eps_deploy.serving import model as model_module
from eps_deploy.serving import service as service_module
from eps_deploy.serving.batching import Batching
from eps_deploy.serving.limits import Limits
from tests.deploy.serving.load import infer_request
from tests.deploy.serving.running import Client, thread, until

ONE = infer_request((1, 1, 8, 8))
PLACES = 3
LIMITS = Limits(body=20_000, header_seconds=5, body_seconds=0.3, idle_seconds=5)


class BlockedEngine:
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
) -> Iterator[tuple[Client, BlockedEngine]]:
    """A server on a thread, and its engine, which is held."""
    engines: list[BlockedEngine] = []

    def open_model(*args: Any, **options: Any) -> Any:
        model = model_module.open_model(*args, **options)
        engines.append(BlockedEngine(model.engines[0]))
        return dataclasses.replace(model, engines=(engines[-1],))

    monkeypatch.setattr(service_module, "open_model", open_model)
    with thread(bundle, limits=limits or Limits(), **source) as client:
        try:
            yield client, engines[0]
        finally:
            engines[0].gate.set()


def read_one(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One answer, whole, and not a byte more."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(1)
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    while len(body) < int(headers["content-length"]):
        body += connection.recv(1)
    return int(first.split()[1]), headers, body


class Full:
    """A server whose engine is held in a batch of one, with a full queue behind that."""

    def __init__(self, client: Client, engine: BlockedEngine, stack: ExitStack) -> None:
        self.client = client
        self.engine = engine
        self.accepted = [stack.enter_context(client.open()) for _ in range(PLACES + 1)]
        self.accepted[0].sendall(ONE)
        engine.entered.acquire()
        for connection in self.accepted[1:]:
            connection.sendall(ONE)
        until(lambda: self.queued == PLACES)

    @property
    def queued(self) -> int:
        return int(self.client.get("/v1/figures").json["queued_images"])

    def refused(self) -> int:
        """How many requests, by the server's own count."""
        return int(self.client.get("/v1/figures").json["refused"].get("queue-full", 0))


@contextmanager
def filled(monkeypatch: pytest.MonkeyPatch, deployed: Path) -> Iterator[Full]:
    batching = Batching(max_queue=PLACES)
    with (
        held(monkeypatch, deployed / "bundle", limits=LIMITS, batching=batching) as (
            client,
            engine,
        ),
        ExitStack() as stack,
    ):
        yield Full(client, engine, stack)
