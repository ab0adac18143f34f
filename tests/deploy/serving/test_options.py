"""Options of eps-serve: limits, instances, engine cache, address."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eps_deploy.bundle import Bundle, open_served
from eps_deploy.cli.serve import main
from eps_deploy.engines.base import Engine
from eps_deploy.serving import model as model_module
from eps_deploy.serving import server as server_module
from eps_deploy.serving.server import Settings
from tests.commands import run
from tests.deploy.serving.running import Process, command, read_all, thread, until
from tests.deploy.serving.test_plan_cache import defer

CONNECTIONS = 6


@pytest.fixture(scope="module")
def served(deployed: Path) -> Iterator[Process]:
    limits = ("--max-body", 1, "--max-pixels", 1, "--max-connections", CONNECTIONS)
    with command(deployed / "bundle", *limits) as process:
        process.wait_ready()
        yield process
        assert process.stop() == 0


def image(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (width, height)).save(content, "PNG")
    return content.getvalue()


def test_the_largest_body(served: Process) -> None:
    """`--max-body 1`"""
    assert served.post("/v1/classify", bytes(1 << 20)).status == 400  # no image
    answer = served.post("/v1/classify", bytes((1 << 20) + 1))
    assert answer.status == 413
    assert str(1 << 20) in answer.error


def test_the_largest_image(served: Process) -> None:
    """`--max-pixels 1`"""
    assert served.post("/v1/classify", image(1000, 1000)).status == 200
    answer = served.post("/v1/classify", image(1001, 1000))
    assert answer.status == 400
    assert "1000000" in answer.error


def test_the_most_connections(served: Process) -> None:
    """`--max-connections`"""
    with ExitStack() as stack:
        busy = [stack.enter_context(served.open()) for _ in range(CONNECTIONS)]
        for connection in busy:
            connection.sendall(b"GET /v2 HTTP/1.1\r\nx")
        with served.open() as one_more:
            assert b"too many connections" in read_all(one_more)
    until(lambda: b"too many" not in served.get("/v2").body)


@pytest.fixture
def settings(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settings as the command hands them to `server.run`, by its arguments."""

    def parse(*args: object) -> Settings:
        given: list[Settings] = []
        monkeypatch.setattr(server_module, "run", given.append)
        result = run("eps-serve", main, "bundle", *args, cwd=deployed)
        assert result.code == 0, result.stderr
        return given.pop()

    return parse


@pytest.mark.parametrize("count", [1, 3])
def test_so_many_engines_are_open(
    deployed: Path, settings: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    opened: list[object] = []

    def counted(bundle: Bundle, *arguments: Any) -> Engine:
        opened.append(bundle)
        return open_served(bundle, *arguments)

    monkeypatch.setattr(model_module, "open_served", counted)
    asked = settings("--instances", count)
    with thread(deployed / "bundle", limits=asked.limits, batching=asked.source.batching):
        assert len(opened) == count


def test_plans_are_kept_in_the_folder(
    bundle: Path, tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(Exception):
        pass

    def cache(folder: Path, **rest: object) -> None:
        raise Told(folder)

    monkeypatch.setattr(model_module, "PlanCache", cache)
    source = settings("--engine-cache", tmp_path / "plans").source
    deferred = defer(bundle)
    with pytest.raises(Told, match="plans"):
        model_module.open_instance(deferred, source, log=print, stop=threading.Event())


def test_where_it_listens(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--host` and `--port`; nothing is served."""
    listening: list[tuple[str, int]] = []

    async def serve(settings: object, bundle: object, token: object, listener: Any) -> bool:
        listening.append(listener.getsockname())
        return True

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(server_module, "serve", serve)
    monkeypatch.setattr("eps_deploy.serving.middleware.configure_logging", lambda: None)
    monkeypatch.setattr(server_module, "allow_files", lambda count: None)
    result = run("eps-serve", main, "bundle", "--host", "0.0.0.0", "--port", port, cwd=deployed)
    assert result.code == 0, result.stderr
    assert listening == [("0.0.0.0", port)]
