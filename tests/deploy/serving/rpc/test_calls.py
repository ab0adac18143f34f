"""gRPC inference on a blocked engine: full queue, deadlines, lost clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.deploy.serving.rpc.blocked import BlockedServer, blocked_server
from tests.deploy.serving.rpc.client import Caller, blank, caller, grpc_port, request
from tests.deploy.serving.running import until

CODE = grpc.StatusCode


class Held:
    """A server with room for three images, whose engine has been given one."""

    def __init__(self, server: BlockedServer, client: Caller) -> None:
        self.server, self.client = server, client
        self.first = client.start(request(blank()))
        assert server.entered() == 1

    def metric(self, name: str) -> float:
        lines = self.server.get("/metrics").body.decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)


@pytest.fixture
def held(deployed: Path) -> Iterator[Held]:
    with (
        blocked_server(deployed / "bundle", "--max-queue", 3) as server,
        caller(grpc_port(server)) as client,
    ):
        it = Held(server, client)
        yield it
        server.go()
        assert it.first.result()
        assert server.queued() == 0
        until(lambda: it.metric("eps_body_bytes") == 0)
        assert server.stop() == 0


def test_a_full_queue(held: Held) -> None:
    two = held.client.start(request(blank(2)))
    held.server.wait_queued(2)
    error = held.client.refused(request(blank(2)))
    assert error.code() is CODE.UNAVAILABLE
    assert error.details() == "2 images are waiting, and 3 may"
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    one = held.client.start(request(blank(1)))
    held.server.wait_queued(3)
    # Now it is refused before its message is received.
    assert held.client.refused(b"no message at all").code() is CODE.UNAVAILABLE
    assert held.client.refused(request(blank(4))).code() is CODE.UNAVAILABLE
    held.server.go()
    assert two.result()
    assert one.result()
    error = held.client.refused(request(blank(4)))
    assert (error.code(), "up to 3 images" in error.details()) == (CODE.INVALID_ARGUMENT, True)
    assert held.metric('eps_refusals_total{reason="queue-full"}') == 3


def test_a_timeout_of_the_request(held: Held) -> None:
    message = request(blank())
    message.parameters["timeout"].int64_param = 20_000
    error = held.client.refused(message)
    assert error.code() is CODE.DEADLINE_EXCEEDED
    assert error.details() == "no answer within the timeout"
    assert held.server.queued() == 0


def test_a_deadline_of_the_client(held: Held) -> None:
    assert held.client.refused(request(blank()), timeout=0.1).code() is CODE.DEADLINE_EXCEEDED
    held.server.wait_queued(0)
    until(lambda: held.metric('eps_refusals_total{reason="deadline"}') == 1)
    code = 'eps_requests_total{code="DEADLINE_EXCEEDED",endpoint="ModelInfer"}'
    assert held.metric(code) == 1


def test_a_call_that_is_cancelled_leaves_the_queue(held: Held) -> None:
    call = held.client.start(request(blank(2)))
    held.server.wait_queued(2)
    call.cancel()
    held.server.wait_queued(0)
    until(lambda: held.metric('eps_refusals_total{reason="disconnected"}') == 1)


def test_a_client_that_goes_away_leaves_the_queue(held: Held) -> None:
    with caller(grpc_port(held.server)) as other:
        call = other.start(request(blank(2)))
        held.server.wait_queued(2)
    assert call.code() is CODE.CANCELLED  # its connection was closed
    held.server.wait_queued(0)


def test_a_message_that_does_not_come(held: Held) -> None:
    """A call that has begun holds up nobody, and its end is noticed."""
    gone: list[Any] = []

    def nothing() -> Iterator[bytes]:
        until(lambda: gone)
        yield from ()

    method = "/inference.GRPCInferenceService/ModelInfer"
    slow = [held.client.channel.stream_unary(method).future(nothing()) for _ in range(3)]
    until(lambda: held.metric("eps_body_bytes") > 3 * 65536)
    waiting = held.client.start(request(blank()))
    held.server.wait_queued(1)
    for call in slow:
        call.cancel()
    gone.append(True)
    until(lambda: held.metric('eps_refusals_total{reason="no-message"}') == 3)
    held.server.go()
    assert waiting.result()
