"""Randomly damaged requests: an answer or an error, never a 5xx, and nothing leaks."""

from __future__ import annotations

import http.client
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from eps_deploy.serving.limits import Limits
from tests.deploy.serving.running import MODEL, Client, thread, until

EXPECTED = {200, 400, 404, 405, 408, 413, 415, 431}
PARTS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\0",
    b"\xff",
    b"-1",
    b"1e400",
    b"null",
    b"true",
]


@pytest.fixture
def client(deployed: Path) -> Iterator[Client]:
    limits = Limits(header_seconds=0.2, body_seconds=0.2, idle_seconds=1)
    with thread(deployed / "bundle", limits=limits) as running:
        yield running


def samples(deployed: Path) -> list[tuple[str, dict[str, str], bytes]]:
    """Right requests: a path, headers and a body each."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 8, 8]}
    flat = json.dumps({"id": "1", "inputs": [{**tensor, "data": [3] * 64}]}).encode()
    head = json.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": 64}}],
            "outputs": [{"name": "logits", "parameters": {"classification": 3}}],
            "parameters": {"timeout": 60_000_000},
        }
    ).encode()
    length = {"Inference-Header-Content-Length": str(len(head))}
    image = next((deployed / "bundle" / "examples").glob("*.png")).read_bytes()
    return [
        (f"{MODEL}/infer", {}, flat),
        (f"{MODEL}/infer", length, head + bytes(64)),
        (f"{MODEL}/infer", {"Inference-Header-Content-Length": "0"}, bytes(64)),
        ("/v1/classify?top=3", {}, image),
        ("/v2/repository/models/eps_resnet/unload", {}, b"{}"),
        ("/v2/repository/index", {}, b"{}"),
    ]


def damaged(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(0, 4)):
        at = draw.randrange(len(changed) + 1)
        match draw.randrange(4):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << draw.randrange(8)
            case 1:
                changed[at:at] = draw.choice(PARTS) * draw.choice([1, 1, 1, 50])
            case 2:
                del changed[at : at + draw.randint(1, 30)]
            case _:
                other = draw.randrange(len(changed) + 1)
                changed[at:at] = changed[other : other + 20]
    return bytes(changed)


def attack(client: Client, deployed: Path, count: int, seed: int) -> Counter[int]:
    draw = random.Random(seed)
    statuses: Counter[int] = Counter()
    right = samples(deployed)
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    for _ in range(count):
        path, headers, content = draw.choice(right)
        method = draw.choice(["POST"] * 9 + ["GET", "PUT", "HEAD", "OPTIONS"])
        if headers and draw.random() < 0.3:
            headers = {"Inference-Header-Content-Length": str(draw.randint(-5, 400))}
        connection.request(method, path, damaged(content, draw), headers)
        with connection.getresponse() as response:
            answer = response.read()
        statuses[response.status] += 1
        assert response.status in EXPECTED, (response.status, answer)
        if response.status != 200 and method != "HEAD":
            assert list(json.loads(answer)) == ["error"]
            assert str(deployed).encode() not in answer
    connection.close()
    return statuses


def attack_raw(client: Client, deployed: Path, count: int, seed: int) -> None:
    """Whole requests, with their request line and headers, damaged and cut."""
    draw = random.Random(seed)
    for _ in range(count):
        path, headers, content = draw.choice(samples(deployed))
        lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        data = damaged("\r\n".join([*lines, "connection: close", "", ""]).encode(), draw) + content
        received = client.raw(damaged(data, draw))
        assert not received or received.startswith(b"HTTP/1.1 ")
        assert not received.startswith(b"HTTP/1.1 5"), received


def unharmed(client: Client, deployed: Path) -> None:
    path, headers, content = samples(deployed)[0]
    assert client.post(path, content, **headers).status == 200
    until(lambda: "eps_body_bytes 0.0" in client.get("/metrics").body.decode())
    figures = client.get("/v1/figures").json
    assert figures["queued_images"] == 0
    assert not {"internal", "engine"}.intersection(figures["refused"])


def test_damaged_requests(client: Client, deployed: Path) -> None:
    statuses = attack(client, deployed, 600, seed=0)
    assert statuses[200] > 50
    assert statuses[400] > 50
    attack_raw(client, deployed, 40, seed=0)
    unharmed(client, deployed)


@pytest.mark.slow
def test_twenty_thousand_damaged_requests(client: Client, deployed: Path) -> None:
    attack(client, deployed, 19_000, seed=1)
    attack_raw(client, deployed, 1000, seed=1)
    unharmed(client, deployed)
