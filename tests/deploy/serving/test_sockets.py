"""Listening sockets and the limit of open files."""

from __future__ import annotations

import socket

import pytest

from eps_core.errors import ConfigError
from eps_deploy.serving.server import accepted, allow_files, listen


def test_a_free_port_and_a_port_that_is_taken() -> None:
    with listen("localhost", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: Address already in use"):
            listen("localhost", port)
        with pytest.raises(ConfigError, match=f"--grpc-port {port}: Address already in use"):
            listen("localhost", port, "--grpc-port")


def test_waiting_connections_are_returned_when_the_listener_is_closed() -> None:
    listener = listen("127.0.0.1", 0)
    with socket.create_connection(listener.getsockname()) as client:
        (connection,) = accepted(listener)
        with connection:
            connection.sendall(b"x")
            assert client.recv(1) == b"x"
    assert listener.fileno() == -1


def test_too_many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1000))
    with pytest.raises(ConfigError, match=r"2000 connections need 2064 .* \(ulimit -n 2064\)"):
        allow_files(2000)
