"""Load shedding: errors without reading the body, on connections that stay usable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.serving.blocked import ONE, PLACES, Full, filled, read_one
from tests.deploy.serving.running import MODEL, read_all, until


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch, deployed: Path) -> Iterator[Full]:
    with filled(monkeypatch, deployed) as made:
        yield made


def test_requests_are_shed_while_the_queue_is_full(full: Full, deployed: Path) -> None:
    """A hundred requests for each that was accepted, in both forms; then all is as before."""
    image = next((deployed / "bundle" / "examples").glob("*.png")).read_bytes()
    with full.client.open() as connection:
        for _ in range(100 * PLACES):
            connection.sendall(ONE)
            status, headers, body = read_one(connection)
            assert (status, headers["retry-after"]) == (503, "1")
            assert headers["content-type"] == "application/json"
            assert json.loads(body) == {"error": f"{PLACES} images are waiting, and {PLACES} may"}
    answer = full.client.post("/v1/classify?top=3", image, X_Request_ID="my-own")
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["x-request-id"] == "my-own"
    assert full.refused() == 100 * PLACES + 1
    assert full.client.get("/v2/health/ready").status == 200
    metrics = full.client.get("/metrics").body.decode()
    assert f'eps_requests_total{{code="503",endpoint="infer"}} {100 * PLACES}.0' in metrics
    assert 'eps_requests_total{code="503",endpoint="classify"} 1.0' in metrics
    full.engine.gate.set()
    for connection in full.accepted:
        assert read_one(connection)[0] == 200
    assert full.queued == 0
    assert full.client.post("/v1/classify", image).status == 200


def test_the_answer_comes_before_the_body(full: Full) -> None:
    """And the connection goes on with the next request, when the body has come after all."""
    head, body = ONE[: ONE.index(b"\r\n\r\n") + 4], ONE[ONE.index(b"\r\n\r\n") + 4 :]
    with full.client.open() as connection:
        connection.sendall(head + body[:5])
        assert read_one(connection)[0] == 503
        connection.sendall(body[5:] + ONE)
        assert read_one(connection)[0] == 503
        full.engine.gate.set()
        until(lambda: full.queued == 0)
        connection.sendall(ONE)
        assert read_one(connection)[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/classify HTTP/1.1\r\nconnection: close\r\ncontent-length: 1\r\n\r\nx",
        b"POST /v1/classify HTTP/1.0\r\ncontent-length: 1\r\n\r\nx",
        b"POST /v1/classify HTTP/1.0\r\nconnection: keep-alive\r\ncontent-length: 1\r\n\r\nx",
    ],
    ids=["close", "HTTP/1.0", "kept HTTP/1.0"],
)
def test_a_client_that_wants_the_connection_closed(full: Full, head: bytes) -> None:
    received = full.client.raw(head)
    assert received.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nconnection: close\r\n" in received


def test_expect_100_continue(full: Full) -> None:
    head = f"POST {MODEL}/infer HTTP/1.1\r\nexpect: 100-continue\r\nconnection: close\r\n"
    with full.client.open() as connection:
        connection.sendall(head.encode() + b"inference-header-content-length: 0\r\n")
        connection.sendall(b"content-length: 64\r\n\r\n")
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(bytes(64))
        assert read_one(connection)[0] == 503


def test_pipelined_behind_one_that_was_accepted(full: Full) -> None:
    """Its turn comes after the answer to the first one."""
    full.accepted[0].sendall(b"GET /v2 HTTP/1.1\r\n\r\n" + ONE)
    assert full.client.get("/v2").status == 200
    full.engine.gate.set()
    assert read_one(full.accepted[0])[2].startswith(b'{"model_name"')
    assert read_one(full.accepted[0])[2].startswith(b'{"name":"eps-serve"')
    assert read_one(full.accepted[0])[0] == 200


def test_other_paths_are_not_shed(full: Full) -> None:
    """Only who wants an inference; and mistakes are told as such where that is cheap."""
    for method, path, status in (
        ("GET", "/v2", 200),
        ("GET", "/v1/figures", 200),
        ("GET", f"{MODEL}/infer", 405),
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v2/repository/index", 200),
    ):
        assert full.client.ask(method, path).status == status
    assert full.refused() == 0


def test_a_shed_request_whose_body_never_comes(full: Full) -> None:
    """The connection is closed, without a second answer to the same request."""
    with full.client.open() as connection:
        connection.sendall(ONE[:-1])
        assert read_one(connection)[0] == 503
        assert read_all(connection) == b""


def test_one_answer_to_a_body_that_was_too_large_and_never_ends(full: Full) -> None:
    full.engine.gate.set()
    until(lambda: full.queued == 0)
    with full.client.open() as connection:
        connection.sendall(b"POST /v1/classify HTTP/1.1\r\ncontent-length: 20001\r\n\r\nabc")
        assert read_one(connection)[0] == 413
        assert read_all(connection) == b""


def test_shutdown_in_the_middle_of_a_shed_body(
    monkeypatch: pytest.MonkeyPatch, deployed: Path
) -> None:
    """The server ends with exit status 0 (`thread` looks), and does not wait for the body."""
    with filled(monkeypatch, deployed) as full:
        connection = full.client.open()
        connection.sendall(ONE[:-1])
        assert read_one(connection)[0] == 503
        full.engine.gate.set()
        for accepted in full.accepted:
            assert read_one(accepted)[0] == 200
    assert read_all(connection) == b""
    connection.close()
