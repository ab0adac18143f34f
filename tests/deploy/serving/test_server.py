"""The server process: probes during loading, shutdown at any time."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from eps_deploy.bundle import load_bundle
from eps_deploy.engines.base import EngineError
from eps_deploy.serving import server
from eps_deploy.serving import service as service_module
from eps_deploy.serving.model import ModelSource
from eps_deploy.serving.server import listen
from tests.deploy.serving.running import MODEL, Client


class Start:
    """A server whose model takes its time to be loaded."""

    def __init__(self, bundle: Path, monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
        monkeypatch.setattr(service_module, "open_model", load)
        self.listener = listen("127.0.0.1", 0)
        self.client = Client(self.listener.getsockname()[1])
        self._settings = server.Settings(source=ModelSource(path=bundle), port=0)
        self._bundle = load_bundle(bundle)
        self._servers: list[Any] = []
        self.result: bool | BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        body = server.serve(
            self._settings, self._bundle, None, self.listener, started=self._servers.append
        )
        try:
            self.result = asyncio.run(body)
        except BaseException as error:
            self.result = error

    def end(self) -> bool | BaseException | None:
        """Tell it to end."""
        if self._servers:
            self._servers[0].should_exit = True
        return self.ended()

    def ended(self) -> bool | BaseException | None:
        """Wait for it to end by itself."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.listener.close()
        return self.result


def test_alive_and_not_ready_while_the_model_is_loaded(
    deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ended then: what is being built is called off, and nobody waits for it."""
    stopped = threading.Event()

    def load(bundle: Any, source: Any, *, stop: threading.Event, **_: Any) -> Any:
        assert stop.wait(60)
        stopped.set()
        raise EngineError("the build was called off")

    start = Start(deployed / "bundle", monkeypatch, load)
    assert start.client.get("/v2/health/live").status == 200
    assert start.client.get("/v2/health/ready").status == 503
    for path in (MODEL, "/v1/card", "/v2/models/stats"):
        answer = start.client.get(path)
        assert (answer.status, answer.error) == (503, "the model is still being loaded")
        assert answer.headers["retry-after"] == "1"
    assert start.client.post(f"{MODEL}/infer", b"{}").status == 503
    assert start.client.get("/").status == 200
    assert start.client.get("/v1/figures").json["ready"] is False
    assert "eps_ready 0.0" in start.client.get("/metrics").body.decode()
    assert start.end() in (True, False)  # whichever came first; but no error
    assert stopped.wait(60)


def test_a_model_that_cannot_be_loaded_ends_the_server(
    deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(bundle: Any, source: Any, **_: Any) -> Any:
        raise EngineError("no such GPU")

    result = Start(deployed / "bundle", monkeypatch, load).ended()
    assert isinstance(result, EngineError)
    assert str(result) == "no such GPU"


def test_token_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"  0123456789abcdef\r\n")
    assert server.read_token(tmp_path / "token") == b"0123456789abcdef"
