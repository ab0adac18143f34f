"""NVIDIA's gRPC client (tritonclient), unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio

from eps_deploy.bench.accuracy import PARITY_LIMITS
from eps_deploy.bundle import load_bundle, open_engine
from eps_deploy.engines.base import Images, Logits
from tests.deploy.serving.documented import run_client
from tests.deploy.serving.rpc.client import NAME, grpc_port
from tests.deploy.serving.running import Process, command


@pytest.fixture(scope="module")
def served(deployed: Path) -> Iterator[Process]:
    """Each request is run by itself."""
    with command(deployed / "bundle", "--no-batching", "--grpc-port", "0") as process:
        process.wait_ready()
        yield process
        assert process.stop() == 0


@pytest.fixture(scope="module")
def client(served: Process) -> Iterator[Any]:
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc_port(served)}") as connection:
        yield connection


@pytest.fixture(scope="module")
def samples(deployed: Path) -> tuple[Images, Logits]:
    """Real images, and what the engine itself answers for all of them in one batch."""
    with np.load(deployed / "bundle" / "samples.npz") as stored:
        images = stored["images"][:7]
    with open_engine(load_bundle(deployed / "bundle")) as engine:
        return images, engine.infer(images)


def asked(images: Images) -> list[Any]:
    given = tritonclient.grpc.InferInput("images", list(images.shape), "UINT8")
    given.set_data_from_numpy(images)
    return [given]


def test_the_engines_logits_bit_for_bit(client: Any, samples: tuple[Images, Logits]) -> None:
    images, logits = samples
    for options in ({}, {"compression_algorithm": "gzip"}, {"client_timeout": 60.0}):
        result = client.infer(NAME, asked(images), request_id="7", timeout=10**7, **options)
        np.testing.assert_array_equal(result.as_numpy("logits"), logits)
        assert result.get_response().id == "7"


class Answers:
    """Of calls that do not wait, in the order in which they come."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[int, Any, Any]] = SimpleQueue()

    def callback(self, number: int) -> Any:
        return lambda result, error: self._queue.put((number, result, error))

    def take(self) -> tuple[int, Logits]:
        number, result, error = self._queue.get(timeout=60)
        assert error is None
        return number, result.as_numpy("logits")


def test_asynchronous_calls(client: Any, samples: tuple[Images, Logits]) -> None:
    images, logits = samples
    answers = Answers()
    for number in range(20):
        client.async_infer(NAME, asked(images), answers.callback(number))
    for _ in range(20):
        np.testing.assert_array_equal(answers.take()[1], logits)


def test_asyncio(served: Process, samples: tuple[Images, Logits]) -> None:
    images, logits = samples
    url = f"127.0.0.1:{grpc_port(served)}"

    async def ask() -> list[Any]:
        async with tritonclient.grpc.aio.InferenceServerClient(url) as client:
            assert await client.is_server_ready()
            return await asyncio.gather(*(client.infer(NAME, asked(images)) for _ in range(8)))

    for result in asyncio.run(ask()):
        np.testing.assert_array_equal(result.as_numpy("logits"), logits)


def test_in_batches_with_others(deployed: Path, samples: tuple[Images, Logits]) -> None:
    """Not bit for bit, but within what a bundle's engine may differ from torch by."""
    images, logits = samples
    limit = PARITY_LIMITS["fp32"] * float(np.abs(logits).max())
    with command(deployed / "bundle", "--max-delay-ms", "5", "--grpc-port", "0") as process:
        process.wait_ready()
        url = f"127.0.0.1:{grpc_port(process)}"
        with tritonclient.grpc.InferenceServerClient(url) as client:
            answers = Answers()
            for row in list(range(7)) * 10:
                client.async_infer(NAME, asked(images[row : row + 1]), answers.callback(row))
            for _ in range(70):
                row, found = answers.take()
                np.testing.assert_allclose(found[0], logits[row], rtol=0, atol=limit)
        sizes = process.get("/v2/models/stats").json["model_stats"][0]["batch_stats"]
        assert max(entry["batch_size"] for entry in sizes) > 1


def test_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(NAME)
    assert client.is_model_ready(NAME, "1")
    assert not client.is_model_ready("other")
    assert not client.is_model_ready(NAME, "2")
    assert client.get_server_metadata().name == "eps-serve"
    told = client.get_model_metadata(NAME, as_json=True)
    assert told["inputs"] == [
        {"name": "images", "datatype": "UINT8", "shape": ["-1", "1", "8", "8"]}
    ]
    assert told["outputs"][0]["shape"] == ["-1", "10"]


def test_labels(client: Any, samples: tuple[Images, Logits]) -> None:
    images, logits = samples
    wanted = [tritonclient.grpc.InferRequestedOutput("logits", class_count=3)]
    words = client.infer(NAME, asked(images), outputs=wanted).as_numpy("logits")
    assert words.shape == (7, 3)
    for row, (word, *_) in zip(logits, words, strict=True):
        _, index, label = word.decode().split(":")
        assert int(index) == row.argmax() == int(label)


def test_errors(client: Any) -> None:
    error = tritonclient.grpc.InferenceServerException
    with pytest.raises(error, match=r"shape of 'images' is \[N, 1, 8, 8\]") as caught:
        client.infer(NAME, asked(np.zeros((1, 1, 9, 9), np.uint8)))
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(error, match="unknown model"):
        client.infer("other", asked(np.zeros((1, 1, 8, 8), np.uint8)))
    with pytest.raises(error, match="no such method") as caught:
        client.get_model_config(NAME)
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_the_documented_client(served: Process) -> None:
    assert run_client("tritonclient.grpc", 8001, grpc_port(served)) == "(3, 10) float32\n"
