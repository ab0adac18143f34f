"""HEALTHCHECK: host and port from the server's command line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from eps_deploy.serving import healthcheck
from eps_deploy.serving.limits import Limits
from tests.deploy.serving.running import thread


def line(*words: str) -> bytes:
    """A command line as /proc has it."""
    return "".join(f"{word}\0" for word in words).encode()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["/opt/eps/bin/python", "/opt/eps/bin/eps-serve", "/models"], ("127.0.0.1", 8000)),
        (["eps-serve", "--host", "0.0.0.0", "/models", "--port", "9000"], ("127.0.0.1", 9000)),
        (["eps-serve", "/models", "--port=9000", "--port=9001"], ("127.0.0.1", 9001)),
        (["eps-serve", "--host", "::", "/models"], ("::1", 8000)),
        (["eps-serve", "--host", "10.0.0.7", "/models"], ("10.0.0.7", 8000)),
        (["/sbin/docker-init", "--", "eps-serve", "/models", "--port", "9"], ("127.0.0.1", 9)),
        (["eps-serve", "--max-queue", "x", "--port", "9000", "--unknown"], ("127.0.0.1", 9000)),
        (["sh", "-c", "sleep 1; eps-serve /models"], ("127.0.0.1", 8000)),
        ([], ("127.0.0.1", 8000)),
    ],
)
def test_host_and_port_of_a_command_line(words: list[str], found: tuple[str, int]) -> None:
    assert healthcheck.address(line(*words)) == found


def test_healthy_on_another_port(
    deployed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "cmdline"
    monkeypatch.setattr(healthcheck, "_FIRST_PROCESS", first)
    with thread(deployed / "bundle", limits=Limits()) as client:
        first.write_bytes(line("eps-serve", "/models", "--port", str(client.port)))
        assert healthcheck.main() == 0
    assert healthcheck.main() == 1  # it has stopped


def test_a_server_that_does_not_answer_is_not_healthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "cmdline"
    monkeypatch.setattr(healthcheck, "_FIRST_PROCESS", first)
    monkeypatch.setattr(healthcheck, "_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        first.write_bytes(line("eps-serve", "/models", "--port", str(silent.getsockname()[1])))
        assert healthcheck.main() == 1
