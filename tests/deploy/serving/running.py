"""Servers for tests: the real command as a process, or the same server on a thread."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eps_deploy.bundle import load_bundle
from eps_deploy.serving import server
from eps_deploy.serving.limits import Limits
from eps_deploy.serving.model import ModelSource
from eps_deploy.serving.server import listen

COMMAND = "import sys; sys.argv[0] = 'eps-serve'; from eps_deploy.cli.serve import main; main()"
MODEL = "/v2/models/eps_resnet"
_PATIENCE = 60.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of an answer in the protocol's form, and nothing else."""
        assert list(self.json) == ["error"], self.body
        message = self.json["error"]
        assert isinstance(message, str)
        return message


class Client:
    """Plain HTTP to a server on this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, None, **headers)

    def post(self, path: str, body: bytes = b"", **headers: str) -> Answer:
        return self.ask("POST", path, body, **headers)

    def open(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=_PATIENCE)

    def raw(self, data: bytes) -> bytes:
        """Everything that comes back on a connection of its own until the server closes it."""
        with self.open() as connection:
            connection.sendall(data)
            return read_all(connection)

    def wait_ready(self) -> None:
        until(lambda: self.get("/v2/health/ready").status == 200)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def until(condition: Any) -> None:
    """Wait until `condition()` is true."""
    end = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.01)


@dataclass
class Process(Client):
    """The command `eps-serve` as a process; `lines` is what it has said on stderr."""

    process: subprocess.Popen[str]
    port: int = 0
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        until(lambda: self.process.poll() is not None or self._listening())
        if listening := self._listening():
            self.port = int(listening[1])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def _listening(self) -> re.Match[str] | None:
        found = (re.search(r"listening on http://127\.0\.0\.1:(\d+)", line) for line in self.lines)
        return next((match for match in found if match), None)

    @property
    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal, wait for the end and return the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(_PATIENCE)
        self._reader.join(_PATIENCE)
        return code


@contextmanager
def command(*args: object, before: str = "") -> Iterator[Process]:
    """`eps-serve` with these arguments, on a port that is free; `before` is run before it."""
    program = f"{before}\n{COMMAND}"
    arguments = [sys.executable, "-c", program, *map(str, args), "--port", "0"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    try:
        yield Process(process)
    finally:
        process.kill()
        process.wait(_PATIENCE)
        assert process.stderr is not None
        process.stderr.close()


@contextmanager
def thread(bundle: Path, *, limits: Limits, **source: Any) -> Iterator[Client]:
    """The same server on a thread of this process, for limits that are no options."""
    settings = server.Settings(
        source=ModelSource(path=bundle, **source), port=0, limits=limits, allow_load=True
    )
    listener = listen("127.0.0.1", 0)
    ended: list[bool | BaseException] = []
    found: list[Any] = []

    def run() -> None:
        body = server.serve(settings, load_bundle(bundle), None, listener, started=found.append)
        try:
            ended.append(asyncio.run(body))
        except BaseException as error:
            ended.append(error)

    running = threading.Thread(target=run)
    running.start()
    client = Client(listener.getsockname()[1])
    try:
        client.wait_ready()
        yield client
    finally:
        found[0].should_exit = True
        running.join(_PATIENCE)
        listener.close()
        assert ended == [True], ended
