"""`eps-serve` in its own process, whose engine is blocked until it is released."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from eps_deploy.engines.base import Engine, Images, Logits
from eps_deploy.serving import service as service_module
from eps_deploy.serving.model import Model, open_model
from tests.deploy.serving.running import Process, until

_ROOT = Path(__file__).parents[4]


class _BlockedEngine:
    """In that process: around the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._gate = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        sys.stdin.readline()
        self._gate.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def infer(self, images: Images) -> Logits:
        print(len(images), flush=True)
        assert self._gate.wait(60)
        return self._engine.infer(images)

    def __exit__(self, *args: object) -> None:
        self._engine.__exit__(None, None, None)


def main() -> None:
    from eps_deploy.cli import serve

    def open_blocked(*args: Any, **options: Any) -> Model:
        model = open_model(*args, **options)
        return dataclasses.replace(model, engines=(_BlockedEngine(model.engines[0]),))

    with mock.patch.object(service_module, "open_model", open_blocked):
        serve.main()


class BlockedServer(Process):
    """Here: the process."""

    def entered(self) -> int:
        """Wait until the engine has been given a batch; how many images."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def queued(self) -> int:
        return int(self.get("/v1/figures").json["queued_images"])

    def wait_queued(self, images: int) -> None:
        until(lambda: self.queued() == images)


@contextmanager
def blocked_server(*args: object) -> Iterator[BlockedServer]:
    """`eps-serve` with these arguments, on ports that are free."""
    code = f"import sys; sys.argv[0] = 'eps-serve'; from {__name__} import main; main()"
    ports = ("--port", "0", "--grpc-port", "0")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args), *ports],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
    )
    with process:
        try:
            server = BlockedServer(process)
            server.wait_ready()
            yield server
        finally:
            process.kill()
