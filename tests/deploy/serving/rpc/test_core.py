"""Requests that stop grpcio's own asyncio server do not stop this one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.deploy.serving.rpc.client import SERVICE, caller, grpc_port
from tests.deploy.serving.rpc.http2 import call
from tests.deploy.serving.running import Process, command

LIVE = f"/{SERVICE}/ServerLive"


@pytest.fixture(scope="module")
def process(deployed: Path) -> Iterator[Process]:
    with command(deployed / "bundle", "--grpc-port", "0") as running:
        running.wait_ready()
        yield running
        assert running.stop() == 0


@pytest.mark.parametrize(
    "path",
    [b"/\xff/\xfe", LIVE.encode() + b"\xff", b"", b"/", b"no slash", b"/a/b/c", b"/\xc3\xa4/x"],
)
def test_any_path(process: Process, path: bytes) -> None:
    """A path that is not UTF-8 stopped grpcio 1.85's server, for all its clients."""
    call(grpc_port(process), path)
    with caller(grpc_port(process)) as client:
        assert client.send("ServerLive")


def test_any_metadata(process: Process) -> None:
    call(grpc_port(process), LIVE.encode(), x_request_id=b"\xff\xfe", authorization=b"\x80")
    with caller(grpc_port(process)) as client:
        assert client.send("ServerLive")
    assert all(line.startswith("{") for line in process.lines)  # no traceback of grpcio's


def test_an_unknown_method(process: Process) -> None:
    with caller(grpc_port(process)) as client, pytest.raises(grpc.RpcError) as caught:
        client.send("ModelConfig")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    metrics = process.get("/metrics").body.decode()
    assert 'eps_requests_total{code="UNIMPLEMENTED",endpoint="none"}' in metrics
