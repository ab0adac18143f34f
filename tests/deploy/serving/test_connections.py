"""Connection limits: slow clients, many clients, invalid HTTP; others are served."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eps_deploy.serving.limits import Limits
from tests.deploy.serving.running import MODEL, Client, read_all, thread, until

LIMITS = Limits(
    body=20_000,
    header=2_000,
    header_seconds=0.3,
    body_seconds=0.5,
    idle_seconds=5,
    connections=20,
)


@pytest.fixture(scope="module")
def client(deployed: Path) -> Iterator[Client]:
    with thread(deployed / "bundle", limits=LIMITS) as running:
        yield running
        assert running.get("/v2/health/ready").status == 200  # whatever it went through


def split(received: bytes) -> tuple[int, str]:
    """Status and error of a raw answer."""
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"\r\ncontent-type: application/json" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n\x00\x01",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\na: b\r\n folded\r\n\x00\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\n\r\n",
        b"CONNECT example.com:80 HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_invalid_http(client: Client, data: bytes) -> None:
    assert split(client.raw(data))[0] == 400


def test_headers_that_are_too_large(client: Client) -> None:
    head = b"GET /v2 HTTP/1.1\r\nx: " + b"y" * 1900
    assert client.raw(head + b"\r\nconnection: close\r\n\r\n").startswith(b"HTTP/1.1 200")
    for data in (
        head + b"y" * 100 + b"\r\n\r\n",
        b"GET /" + b"y" * 2100 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 500 + b"\r\n",
        head + b"y" * 100_000,  # and they never end
    ):
        status, error = split(client.raw(data))
        assert status == 431
        assert "2000 bytes" in error


def test_headers_that_take_too_long(client: Client) -> None:
    status, error = split(client.raw(b"GET /v2 HTTP/1.1\r\nx: "))
    assert (status, error) == (408, "the request's headers took too long")


def test_a_trickle_of_bytes_does_not_keep_a_connection_open(client: Client) -> None:
    """Slowloris: a byte now and then, for ever."""
    with client.open() as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\n")
        connection.settimeout(0.05)
        received, end = b"", time.monotonic() + 30
        while not received and time.monotonic() < end:
            connection.sendall(b"x")
            try:
                received = connection.recv(65536)
            except TimeoutError:
                continue
    assert split(received)[0] == 408


def test_a_body_that_takes_too_long(client: Client) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\ncontent-length: 100\r\n\r\nabc"
    status, error = split(client.raw(head))
    assert (status, error) == (408, "the request's body took too long")


def test_a_silent_connection_is_closed(client: Client) -> None:
    assert client.raw(b"") == b""


def test_a_body_that_is_too_large(client: Client) -> None:
    answer = client.post("/v1/classify", b"x" * 20_001)
    assert answer.status == 413
    assert "20000 bytes" in answer.error
    chunk = b"4e20\r\n" + b"x" * 20_000 + b"\r\n"
    head = b"POST /v1/classify HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
    with client.open() as connection:
        connection.sendall(head + chunk + b"1\r\nx\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    head = b"POST /v1/classify HTTP/1.1\r\ncontent-length: 99999999999999999\r\n\r\n"
    with client.open() as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_slow_client_delays_no_other(client: Client) -> None:
    """More than half of all connections do nothing but be slow."""
    slow = [client.open() for _ in range(15)]
    for connection in slow:
        connection.sendall(b"POST /v1/classify HTTP/1.1\r\ncontent-length: 100\r\n\r\n")
    for _ in range(5):
        assert client.get("/v2").status == 200
    for connection in slow:
        assert split(read_all(connection))[0] == 408
        connection.close()


def test_an_idle_connection_is_closed_for_a_new_one(client: Client) -> None:
    """Of the connections that are kept open one is closed when there are too many."""
    kept = []
    for _ in range(20):
        connection = client.open()
        connection.sendall(b"GET /v2 HTTP/1.1\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        kept.append(connection)
    assert client.get("/v2").status == 200
    for connection in kept:
        connection.close()


def test_too_many_busy_connections(client: Client) -> None:
    busy = [client.open() for _ in range(20)]
    for connection in busy:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nx")
    try:
        status, error = split(client.raw(b""))
        assert (status, error) == (503, "too many connections")
    finally:
        for connection in busy:
            connection.close()
    until(lambda: _answers(client))


def _answers(client: Client) -> bool:
    try:
        return client.get("/v2").status == 200
    except OSError:
        return False


def test_pipelined_requests_are_answered_in_order(client: Client) -> None:
    data = b"GET /v2 HTTP/1.1\r\n\r\nGET /nowhere HTTP/1.1\r\n\r\n"
    received = client.raw(data + b"GET /v2/health/live HTTP/1.1\r\nconnection: close\r\n\r\n")
    statuses = [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"404", b"200"]


def test_expect_100_continue(client: Client) -> None:
    """Expect: 100-continue, as curl does for large bodies."""
    head = b"POST /v1/classify HTTP/1.1\r\nexpect: 100-continue\r\nconnection: close\r\n"
    with client.open() as connection:
        connection.sendall(head + b"content-length: 3\r\n\r\n")
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"abc")
        assert split(read_all(connection))[0] == 400


def test_a_client_that_goes_away_in_the_middle(client: Client) -> None:
    for data in (
        b"GET",
        b"POST /v1/classify HTTP/1.1\r\ncontent-length: 100\r\n\r\nabc",
        b"GET /v2 HTTP/1.1\r\n\r\nGET /v2 HTTP/1.1\r\n\r\n",
    ):
        connection = client.open()
        connection.sendall(data)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # RST
        connection.close()
    assert client.get("/v2").status == 200
    until(lambda: "eps_body_bytes 0.0" in client.get("/metrics").body.decode())


def test_an_upgrade_is_ignored(client: Client) -> None:
    """Java's client offers HTTP/2 with its first request; it gets its answer in HTTP/1.1."""
    head = b"POST /v1/classify HTTP/1.1\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"
    with client.open() as connection:
        for _ in range(2):
            connection.sendall(head + b"content-length: 4\r\n\r\ntext")
            received = connection.recv(65536)
            while not received.endswith(b"}"):
                received += connection.recv(65536)
            assert "JPEG, PNG or WebP" in split(received)[1]


def test_many_requests_on_one_connection(client: Client) -> None:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 8, 8], "data": [7] * 64}
    body = json.dumps({"inputs": [tensor]})
    connection = http.client.HTTPConnection("127.0.0.1", client.port)
    for _ in range(5):
        connection.request("POST", f"{MODEL}/infer", body)
        socket_before = connection.sock
        with connection.getresponse() as response:
            assert response.status == 200
            response.read()
        assert connection.sock is socket_before
    connection.close()
