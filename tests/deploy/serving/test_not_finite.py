"""Logits that are not finite fail only their own request, over HTTP and gRPC."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from tests.deploy.serving.rpc.client import caller, grpc_port, request
from tests.deploy.serving.running import MODEL, Process, command

COLOURS = {"nan": 255, "inf": 0}


@pytest.fixture(scope="module")
def process(overflowing: Path) -> Iterator[Process]:
    with command(overflowing, "--grpc-port", "0") as running:
        running.wait_ready()
        yield running
        assert running.stop() == 0
        # Nothing but JSON lines: no warning of numpy's between them.
        assert all(line.startswith("{") for line in running.lines)


def document(pixel: int, **output: Any) -> bytes:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 8, 8], "data": [pixel] * 64}
    wanted = {"name": "logits", "parameters": output}
    return json.dumps({"inputs": [tensor], "outputs": [wanted]}).encode()


@pytest.mark.parametrize("pixel", COLOURS.values(), ids=COLOURS)
@pytest.mark.parametrize(
    "form",
    [{}, {"binary_data": True}, {"classification": 2}, {"classification": 2, "binary_data": True}],
    ids=["logits", "bytes", "labels", "labels as bytes"],
)
def test_infer(process: Process, form: dict[str, Any], pixel: int) -> None:
    answer = process.post(f"{MODEL}/infer", document(pixel, **form))
    assert (answer.status, answer.error) == (500, "the network's logits are not finite")
    assert process.post(f"{MODEL}/infer", document(100, **form)).status == 200


@pytest.mark.parametrize("pixel", COLOURS.values(), ids=COLOURS)
def test_a_raw_body(process: Process, pixel: int) -> None:
    length = {"Inference-Header-Content-Length": "0"}
    answer = process.post(f"{MODEL}/infer", bytes([pixel] * 64), **length)
    assert (answer.status, answer.error) == (500, "the network's logits are not finite")


@pytest.mark.parametrize("pixel", COLOURS.values(), ids=COLOURS)
def test_classify(process: Process, pixel: int) -> None:
    file = io.BytesIO()
    Image.new("L", (8, 8), pixel).save(file, "PNG")
    answer = process.post("/v1/classify", file.getvalue())
    assert (answer.status, answer.error) == (500, "the network's logits are not finite")


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "numbers"])
@pytest.mark.parametrize("labels", [0, 2], ids=["logits", "labels"])
def test_grpc(process: Process, raw: bool, labels: int) -> None:
    with caller(grpc_port(process)) as client:
        message = request(np.full((1, 1, 8, 8), 255, np.uint8), raw=raw)
        if labels:
            output = message.outputs.add(name="logits")
            output.parameters["classification"].int64_param = labels
        error = client.refused(message)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == "the network's logits are not finite"


def test_they_are_counted_and_the_server_goes_on(process: Process) -> None:
    def count() -> float:
        lines = process.get("/metrics").body.decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return float(dict(pairs)["eps_not_finite_images_total"])

    before = count()
    for _ in range(4):  # an engine that fails so often is taken for broken
        assert process.post(f"{MODEL}/infer", document(255)).status == 500
    assert count() == before + 4
    assert process.get("/v2/health/ready").status == 200
