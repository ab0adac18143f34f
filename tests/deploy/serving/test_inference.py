"""HTTP inference on a blocked engine: full queue, deadlines, lost clients."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eps_deploy.bundle import load_bundle
from eps_deploy.serving.batching import Batching
from eps_deploy.serving.limits import Limits
from tests.deploy.serving.engines import SHAPE, FakeEngine
from tests.deploy.serving.running import Answer, Client, thread, until
from tests.deploy.serving.test_service import Loader

INFER = "/v2/models/m/infer"


class Held:
    """A server whose engine waits until it is let go on."""

    def __init__(self, client: Client, engine: FakeEngine) -> None:
        self.client, self.engine = client, engine
        self.answers: list[Answer] = []
        self._threads: list[threading.Thread] = []
        engine.open_gate.clear()

    def ask(self, *values: int, **parameters: Any) -> Answer:
        return self.client.post(INFER, body(*values, **parameters))

    def start(self, *values: int) -> None:
        """Ask on a thread; the answer comes with `finish`."""
        asking = threading.Thread(target=lambda: self.answers.append(self.ask(*values)))
        asking.start()
        self._threads.append(asking)

    def queued(self) -> int:
        return int(self.client.get("/v1/figures").json["queued_images"])

    def finish(self) -> list[int]:
        self.engine.open_gate.set()
        for asking in self._threads:
            asking.join(60)
        return sorted(answer.status for answer in self.answers)


def body(*values: int, **parameters: Any) -> bytes:
    data = [value for value in values for _ in range(4)]
    tensor = {"name": "images", "datatype": "UINT8", "shape": [len(values), *SHAPE], "data": data}
    return json.dumps({"inputs": [tensor], "parameters": parameters}).encode()


@pytest.fixture
def held(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    loader = Loader(monkeypatch, load_bundle(deployed / "bundle"))
    batching = Batching(max_queue=3)
    with thread(deployed / "bundle", limits=Limits(), batching=batching) as client:
        it = Held(client, loader.engines[0])
        try:
            yield it
        finally:
            it.finish()


def test_a_full_queue(held: Held) -> None:
    held.start(1)
    held.engine.entered.acquire()
    held.start(2, 3)
    until(lambda: held.queued() == 2)
    refused = held.ask(4, 5)
    assert refused.status == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.error == "2 images are waiting, and 3 may"
    held.start(6)
    until(lambda: held.queued() == 3)
    assert held.client.get("/v2/health/ready").status == 200  # it is busy, not broken
    assert held.finish() == [200, 200, 200]
    assert held.ask(7, 8, 9).status == 200


def test_more_images_than_can_ever_wait(held: Held) -> None:
    answer = held.ask(1, 2, 3, 4)
    assert answer.status == 400
    assert "up to 3 images" in answer.error


def test_a_deadline(held: Held) -> None:
    held.start(1)
    held.engine.entered.acquire()
    late = held.ask(2, timeout=20_000)
    assert late.status == 503
    assert "timeout" in late.error
    assert held.queued() == 0
    assert held.finish() == [200]
    assert held.engine.batches == [[1]]
    assert held.ask(3, timeout=60_000_000).status == 200


def test_a_client_that_goes_away_leaves_the_queue(held: Held) -> None:
    held.start(1)
    held.engine.entered.acquire()
    content = body(2, 3)
    head = f"POST {INFER} HTTP/1.1\r\ncontent-length: {len(content)}\r\n\r\n".encode()
    connection = held.client.open()
    connection.sendall(head + content)
    until(lambda: held.queued() == 2)
    connection.close()
    until(lambda: held.queued() == 0)
    assert held.finish() == [200]
    assert held.engine.batches == [[1]]
    metrics = held.client.get("/metrics").body.decode()
    assert 'eps_refusals_total{reason="disconnected"} 1.0' in metrics


def test_an_engine_that_fails(held: Held) -> None:
    held.engine.open_gate.set()
    held.engine.fails = True
    for _ in range(3):
        answer = held.ask(1)
        assert (answer.status, answer.error) == (500, "the engine failed")
    assert held.client.get("/v2/health/live").status == 503
    assert held.client.get("/v2/health/ready").status == 503
    held.engine.fails = False
    assert held.ask(1).status == 200
    assert held.client.get("/v2/health/live").status == 200


def test_statistics(held: Held) -> None:
    held.engine.open_gate.set()
    for values in ((1,), (2, 3, 4)):
        assert held.ask(*values).status == 200
    assert held.ask(1, 2, 3, 4).status == 400
    (told,) = held.client.get("/v2/models/stats").json["model_stats"]
    assert (told["inference_count"], told["execution_count"]) == (4, 2)
    assert told["inference_stats"]["success"]["count"] == 2
    assert told["inference_stats"]["fail"]["count"] == 1
    assert told["inference_stats"]["queue"]["count"] == 2
    assert [entry["batch_size"] for entry in told["batch_stats"]] == [1, 3]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (INFER, {"Inference-Header-Content-Length": "x"}, 400),
        (INFER, {"Inference-Header-Content-Length": "-1"}, 400),
        (INFER, {"Inference-Header-Content-Length": "²"}, 400),
        (INFER, {"Inference-Header-Content-Length": "9" * 30}, 400),
        (INFER, {"Content-Encoding": "gzip"}, 415),
        ("/v2/models/m/versions/2/infer", {}, 404),
        ("/v2/models/M/infer", {}, 404),
        ("/v2/models/m%00/infer", {}, 404),
        ("/v2/models/m/infer/", {}, 404),
        ("/v2/models/m", {}, 405),
        ("/v1/classify?top=0", {}, 400),
        ("/v1/classify?top=x", {}, 400),
        ("/v1/classify?top=%C2%B2", {}, 400),
        ("/v1/classify?top=" + "9" * 5000, {}, 400),
        ("/v1/classify", {}, 400),
        ("/v2/repository/index", {}, 400),
        ("/v2/repository/models/m/load", {}, 400),
    ],
)
def test_error_messages(held: Held, path: str, headers: dict[str, str], status: int) -> None:
    given = {name: value.encode("utf-8").decode("latin-1") for name, value in headers.items()}
    answer = held.client.post(path, b"[]", **given)
    assert answer.status == status
    assert answer.error


def test_an_index_and_a_version(held: Held) -> None:
    held.engine.open_gate.set()
    assert held.client.post("/v2/repository/index", b"").status == 200
    assert held.client.post("/v2/repository/index", b'{"ready": true}').json[0]["version"] == "1"
    assert held.client.post("/v2/models/m/versions/1/infer", body(1)).status == 200


def test_a_raw_body(held: Held) -> None:
    held.engine.open_gate.set()
    length = {"Inference-Header-Content-Length": "0"}
    answer = held.client.post(INFER, bytes([5] * 4), **length)
    assert answer.status == 200
    json_length = int(answer.headers["inference-header-content-length"])
    assert len(answer.body) - json_length == 8
    assert held.client.post(INFER, bytes(5), **length).status == 400
