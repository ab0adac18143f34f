"""Random bytes as messages: an answer or an error, and the server goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.deploy.serving.rpc.client import Caller, blank, caller, grpc_port, request
from tests.deploy.serving.running import Process, command
from tests.deploy.serving.test_fuzz import damaged

CODE = grpc.StatusCode
EXPECTED = {CODE.OK, CODE.INVALID_ARGUMENT, CODE.NOT_FOUND}
METHODS = ("ModelInfer", "ModelInfer", "ModelInfer", "ModelMetadata", "ModelReady", "ServerLive")


def right() -> list[bytes]:
    messages = [request(blank(2)), request(blank(), raw=False)]
    messages[0].outputs.add(name="logits").parameters["classification"].int64_param = 3
    messages[0].parameters["timeout"].int64_param = 60_000_000
    messages[1].id = "7"
    return [message.SerializeToString() for message in messages]


def field(number: int, kind: int, value: bytes) -> bytes:
    if kind == 2:
        value = bytes([len(value)]) + value
    return bytes([number << 3 | kind]) + value


FIELDS = st.builds(
    field, st.integers(0, 15), st.sampled_from([0, 1, 2, 2, 2, 3, 5]), st.binary(max_size=100)
)
CONTENTS = st.one_of(
    st.binary(max_size=300),
    st.lists(FIELDS, max_size=10).map(b"".join),
    st.builds(damaged, st.sampled_from(right()), st.randoms(use_true_random=False)),
)


@pytest.fixture(scope="module")
def process(deployed: Path) -> Iterator[Process]:
    with command(deployed / "bundle", "--grpc-port", "0") as running:
        running.wait_ready()
        yield running
        with caller(grpc_port(running)) as client:
            assert client.infer(request(blank())).outputs
        figures = running.get("/v1/figures").json
        assert figures["queued_images"] == 0
        assert not {"internal", "engine"}.intersection(figures["refused"])
        assert "eps_body_bytes 0.0" in running.get("/metrics").body.decode()
        assert running.stop() == 0
        assert all(line.startswith("{") for line in running.lines)


@pytest.fixture(scope="module")
def client(process: Process) -> Iterator[Caller]:
    with caller(grpc_port(process)) as connection:
        yield connection


def attack(client: Caller, method: str, content: bytes, compressed: bool) -> None:
    code, details = CODE.OK, ""
    try:
        client.send(method, content, compression=grpc.Compression.Gzip if compressed else None)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
    assert code in EXPECTED, details
    assert "/" not in details


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(METHODS), CONTENTS, st.booleans())
def test_any_bytes(client: Caller, method: str, content: bytes, compressed: bool) -> None:
    attack(client, method, content, compressed)


@pytest.mark.slow
@settings(max_examples=5000, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(METHODS), CONTENTS, st.booleans())
def test_five_thousand(client: Caller, method: str, content: bytes, compressed: bool) -> None:
    attack(client, method, content, compressed)
