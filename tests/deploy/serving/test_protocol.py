"""KServe v2: valid requests, API errors, answers, and where a request is parsed."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from eps_deploy.serving.protocol import (
    ApiError,
    InferRequest,
    Signature,
    parse_request,
    read_request,
    write_answer,
)

SIGNATURE = Signature(
    name="m", version="1", input_shape=(1, 2, 2), labels=("ant", "bee", "cat"), max_images=8
)
PIXELS = np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2)
LOGITS = np.array([[0.1, 3.0, -1.0], [2.5, 2.5, 1e-8]], dtype=np.float32)


def tensor(**changes: Any) -> dict[str, Any]:
    fields = {"name": "images", "datatype": "UINT8", "shape": [2, 1, 2, 2]}
    fields |= {"data": PIXELS.tolist()}
    return {key: value for key, value in {**fields, **changes}.items() if value is not ...}


def binary(**changes: Any) -> dict[str, Any]:
    return tensor(data=..., **{"parameters": {"binary_data_size": 8}, **changes})


def read(document: Any, raw: bytes = b"", length: int | None = None) -> InferRequest:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    if raw and length is None:
        length = len(text)
    return read_request(text + raw, length, SIGNATURE)


def test_json_nested_and_flat() -> None:
    for data in (PIXELS.tolist(), PIXELS.ravel().tolist()):
        request = read({"inputs": [tensor(data=data)]})
        assert request.images.dtype == np.uint8
        np.testing.assert_array_equal(request.images, PIXELS)
        assert (request.id, request.binary, request.timeout) == ("", False, None)


def test_binary() -> None:
    request = read({"id": "a7", "inputs": [binary()]}, PIXELS.tobytes())
    np.testing.assert_array_equal(request.images, PIXELS)
    assert (request.id, request.binary) == ("a7", False)


def test_a_raw_body_is_one_image_and_gets_a_binary_answer() -> None:
    request = read_request(PIXELS[0].tobytes(), 0, SIGNATURE)
    np.testing.assert_array_equal(request.images, PIXELS[:1])
    assert request.binary


def test_output_options() -> None:
    every = {"inputs": [tensor()], "parameters": {"binary_data_output": True}}
    assert read(every).binary
    one = {**every, "outputs": [{"name": "logits", "parameters": {"binary_data": False}}]}
    assert not read(one).binary
    classes = [{"name": "logits", "parameters": {"classification": 9}}]
    assert read({**every, "outputs": classes}).classification == 3  # there are no more
    assert read({**every, "outputs": []}).binary
    assert read({"inputs": [tensor()], "parameters": {"timeout": 2500}}).timeout == 0.0025
    assert read({"inputs": [tensor()], "parameters": {"timeout": 0}}).timeout is None
    assert read({"inputs": [tensor()], "parameters": {"priority": 3}}).timeout is None


# As MLServer's types write a request (pydantic's `model_dump_json`), and Jackson does.
NULLS = {
    "id": None,
    "parameters": {
        "content_type": None,
        "headers": None,
        "timeout": None,
        "binary_data_output": None,
    },
    "inputs": [
        tensor(
            parameters={
                "content_type": None,
                "headers": None,
                "binary_data_size": None,
                "shared_memory_region": None,
            }
        )
    ],
    "outputs": [
        {
            "name": "logits",
            "parameters": {
                "content_type": None,
                "binary_data": None,
                "classification": None,
                "shared_memory_region": None,
            },
        }
    ],
}


@pytest.mark.parametrize(
    "document",
    [NULLS, {**NULLS, "parameters": None, "outputs": None, "inputs": [tensor(parameters=None)]}],
)
def test_null_counts_as_absent(document: Any) -> None:
    request = read(document)
    np.testing.assert_array_equal(request.images, PIXELS)
    found = (request.id, request.binary, request.classification, request.timeout)
    assert found == ("", False, 0, None)
    request = read({**document, "inputs": [{**binary(), "data": None}]}, PIXELS.tobytes())
    np.testing.assert_array_equal(request.images, PIXELS)


WRONG: list[tuple[Any, str]] = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"\xff{}", "not JSON"),
    (b'{"inputs": NaN}', "not JSON"),
    (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b"[]", "JSON object"),
    ({}, "inputs holds []"),
    ({"inputs": {}}, "inputs: expected `array | null`"),
    ({"inputs": [1]}, "inputs[0]: expected `object`"),
    ({"inputs": []}, "one input, 'images'"),
    ({"inputs": [tensor(name="pixels")]}, "one input, 'images'"),
    ({"inputs": [tensor(name=["x" * 999])]}, "..."),
    ({"inputs": [tensor(), tensor()]}, "one input, 'images'"),
    ({"inputs": [tensor(datatype="FP32")]}, "UINT8"),
    ({"inputs": [tensor(datatype=...)]}, "UINT8"),
    ({"inputs": [tensor(shape=...)]}, "shape of 'images' is [N, 1, 2, 2], not null"),
    ({"inputs": [tensor(shape=[1, 2, 2])]}, "not [1, 2, 2]"),
    ({"inputs": [tensor(shape=[2, 1, 2, 3])]}, "not [2, 1, 2, 3]"),
    ({"inputs": [tensor(shape=[0, 1, 2, 2])]}, "not [0, 1, 2, 2]"),
    ({"inputs": [tensor(shape=[-2, 1, 2, 2])]}, "not [-2, 1, 2, 2]"),
    ({"inputs": [tensor(shape=[True, 1, 2, 2])]}, "not [true, 1, 2, 2]"),
    ({"inputs": [tensor(shape=[2.0, 1, 2, 2])]}, "not [2.0, 1, 2, 2]"),
    ({"inputs": [tensor(shape=[9, 1, 2, 2])]}, "up to 8"),
    ({"inputs": [tensor(shape=[10**400, 1, 2, 2])]}, "up to 8 images"),
    ({"inputs": [tensor(data=...)]}, "needs data"),
    ({"inputs": [tensor(data="AAAA")]}, "needs data"),
    ({"inputs": [tensor(data=[])]}, "8 pixels, not 0"),
    ({"inputs": [tensor(data=[0] * 7)]}, "8 pixels, not 7"),
    ({"inputs": [tensor(data=[0] * 7 + [256])]}, "between 0 and 255"),
    ({"inputs": [tensor(data=[0] * 7 + [-1])]}, "between 0 and 255"),
    ({"inputs": [tensor(data=[0] * 7 + [10**400])]}, "between 0 and 255"),
    ({"inputs": [tensor(data=[0] * 7 + [0.5])]}, "whole numbers"),
    ({"inputs": [tensor(data=[0] * 7 + [True])]}, "whole numbers"),
    ({"inputs": [tensor(data=[0] * 7 + [None])]}, "whole numbers"),
    ({"inputs": [tensor(data=[0] * 7 + [[0]])]}, "whole numbers"),
    ({"inputs": [tensor(data=[[[[0, 0], [0, 0]]]])]}, "axis 0"),
    ({"inputs": [tensor(data=[[[[0, 0], [0]]], [[[0, 0], [0, 0]]]])]}, "axis 3"),
    ({"inputs": [tensor(data=[[[[0, 0], [0, 0]]], 7])]}, "axis 1"),
    ({"inputs": [tensor(data=[[[[0, [0]], [0, 0]]], [[[0, 0], [0, 0]]]])]}, "whole numbers"),
    (
        {"inputs": [tensor(parameters=7)]},
        "inputs[0].parameters: expected `object | null`, got `int`",
    ),
    ({"inputs": [tensor(parameters={"shared_memory_region": "x"})]}, "shared memory"),
    ({"inputs": [binary()]}, "0 bytes follow"),
    ({"inputs": [tensor()], "id": 7}, "id: expected `str | null`, got `int`"),
    ({"inputs": [tensor()], "id": "x" * 257}, "id: expected `str` of length <= 256"),
    ({"inputs": [tensor()], "id": "\ud800"}, "surrogate"),
    ({"inputs": [tensor()], "parameters": []}, "parameters: expected `object | null`"),
    (
        {"inputs": [tensor()], "parameters": {"timeout": -1}},
        "parameters.timeout: expected `int` >= 0",
    ),
    (
        {"inputs": [tensor()], "parameters": {"timeout": "1s"}},
        "parameters.timeout: expected `int | null`",
    ),
    (
        {"inputs": [tensor()], "parameters": {"timeout": 10**30}},
        "parameters.timeout: expected `int` <=",
    ),
    (
        {"inputs": [tensor()], "parameters": {"binary_data_output": 1}},
        "parameters.binary_data_output: expected",
    ),
    ({"inputs": [tensor()], "outputs": {}}, "outputs: expected `array | null`"),
    ({"inputs": [tensor()], "outputs": ["logits"]}, "outputs[0]: expected `object`"),
    ({"inputs": [tensor()], "outputs": [{"name": "softmax"}]}, "one output, 'logits'"),
    ({"inputs": [tensor()], "outputs": [{"name": "logits"}] * 2}, "one output, 'logits'"),
]


@pytest.mark.parametrize(("document", "told"), WRONG, ids=range(len(WRONG)))
def test_invalid_json_requests(document: Any, told: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(document)
    assert told in str(caught.value)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("document", "raw", "told"),
    [
        ({"inputs": [binary()]}, b"1234567", "7 bytes follow"),
        ({"inputs": [binary()]}, b"123456789", "9 bytes follow"),
        ({"inputs": [binary(parameters={"binary_data_size": 7})]}, b"1234567", "has 8 bytes"),
        ({"inputs": [binary(parameters={"binary_data_size": True})]}, b"1", "got `bool`"),
        ({"inputs": [binary(parameters={"binary_data_size": "8"})]}, b"12345678", "got `str`"),
        ({"inputs": [{**binary(), "data": [0] * 8}]}, b"12345678", "both"),
        ({"inputs": [tensor()]}, b"1", "belong to no tensor"),
    ],
)
def test_invalid_binary_requests(document: Any, raw: bytes, told: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(document, raw)
    assert told in str(caught.value)
    assert caught.value.status == 400


@pytest.mark.parametrize("length", [-1, 5, 10**9])
def test_an_invalid_json_length(length: int) -> None:
    with pytest.raises(ApiError, match="the body has 2 bytes"):
        read_request(b"{}", length, SIGNATURE)


@pytest.mark.parametrize("body", [b"", b"123", b"12345"])
def test_a_raw_body_of_another_size(body: bytes) -> None:
    with pytest.raises(ApiError, match="has 4 bytes, not"):
        read_request(body, 0, SIGNATURE)


def test_a_json_answer_holds_the_exact_logits() -> None:
    request = InferRequest(images=PIXELS, id='say "so"')
    body, length = write_answer(request, LOGITS, SIGNATURE)
    assert length is None
    answer = json.loads(body)
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("m", "1", 'say "so"')
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [2, 3])
    found = np.array(output["data"], dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(found, LOGITS)


def test_a_binary_answer() -> None:
    body, length = write_answer(InferRequest(images=PIXELS, binary=True), LOGITS, SIGNATURE)
    assert length is not None
    answer = json.loads(body[:length])
    assert "id" not in answer
    (output,) = answer["outputs"]
    assert output["parameters"] == {"binary_data_size": 24}
    assert "data" not in output
    np.testing.assert_array_equal(np.frombuffer(body[length:], "<f4").reshape(2, 3), LOGITS)


def test_classification() -> None:
    request = InferRequest(images=PIXELS, classification=2)
    body, _ = write_answer(request, LOGITS, SIGNATURE)
    (output,) = json.loads(body)["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == [
        "3.000000:1:bee",
        "0.100000:0:ant",
        "2.500000:0:ant",
        "2.500000:1:bee",
    ]
    request = InferRequest(images=PIXELS, classification=1, binary=True)
    body, length = write_answer(request, LOGITS, SIGNATURE)
    word = b"3.000000:1:bee"
    assert body[length:].startswith(struct.pack("<I", len(word)) + word)


def test_small_requests_are_parsed_at_once_and_large_ones_on_a_thread() -> None:
    limit = 1 << 20
    threads: list[threading.Thread] = []

    def work() -> InferRequest:
        threads.append(threading.current_thread())
        return InferRequest(images=np.zeros((1, 1, 2, 2), np.uint8))

    async def body() -> None:
        with ThreadPoolExecutor(1) as workers:

            async def parse(size: int) -> InferRequest:
                told = ("of JSON", "elsewhere")
                return await parse_request(work, size, limit=limit, workers=workers, told=told)

            assert (await parse(100)).id == ""
            assert (await parse(limit)).id == ""
            with pytest.raises(ApiError) as caught:
                await parse(limit + 1)
        assert caught.value.status == 413
        assert str(caught.value) == (
            "1048577 bytes of JSON; at most 1048576 are accepted: send the tensor elsewhere"
        )

    asyncio.run(body())
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()
    assert len(threads) == 2
