"""gRPC messages: valid requests, errors, answers."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as messages

from eps_deploy.bundle import load_bundle, open_engine
from eps_deploy.engines.base import Images, Logits
from tests.deploy.serving.rpc.client import Caller, blank, caller, grpc_port, request
from tests.deploy.serving.running import Process, command

CODE = grpc.StatusCode


@pytest.fixture(scope="module")
def process(deployed: Path) -> Iterator[Process]:
    with command(deployed / "bundle", "--no-batching", "--grpc-port", "0") as running:
        running.wait_ready()
        yield running
        figures = running.get("/v1/figures").json
        assert not {"internal", "engine"}.intersection(figures["refused"])
        assert "eps_body_bytes 0.0" in running.get("/metrics").body.decode()


@pytest.fixture(scope="module")
def client(process: Process) -> Iterator[Caller]:
    with caller(grpc_port(process)) as connection:
        yield connection


@pytest.fixture(scope="module")
def samples(deployed: Path) -> tuple[Images, Logits]:
    with np.load(deployed / "bundle" / "samples.npz") as stored:
        images = stored["images"][:5]
    with open_engine(load_bundle(deployed / "bundle")) as engine:
        return images, engine.infer(images)


def test_raw_pixels_return_raw_logits(client: Caller, samples: tuple[Images, Logits]) -> None:
    images, logits = samples
    message = request(images)
    message.id = "a7"
    answer = client.infer(message)
    assert (answer.model_name, answer.model_version, answer.id) == ("eps_resnet", "1", "a7")
    (output,) = answer.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("logits", "FP32", [5, 10])
    assert not output.HasField("contents")
    assert answer.raw_output_contents == [logits.tobytes()]


def test_numbers_return_numbers(client: Caller, samples: tuple[Images, Logits]) -> None:
    images, logits = samples
    answer = client.infer(request(images, raw=False))
    assert not answer.raw_output_contents
    found = np.array(answer.outputs[0].contents.fp32_contents, dtype=np.float32)
    np.testing.assert_array_equal(found.reshape(5, 10), logits)


@pytest.mark.parametrize("raw", [True, False])
def test_classification(client: Caller, samples: tuple[Images, Logits], raw: bool) -> None:
    images, logits = samples
    message = request(images, raw=raw)
    message.outputs.add(name="logits").parameters["classification"].int64_param = 2
    answer = client.infer(message)
    (output,) = answer.outputs
    assert (output.datatype, list(output.shape)) == ("BYTES", [5, 2])
    best = int(logits[0].argmax())
    word = f"{logits[0, best]:f}:{best}:{best}".encode()
    if raw:
        assert answer.raw_output_contents[0].startswith(struct.pack("<I", len(word)) + word)
    else:
        assert len(output.contents.bytes_contents) == 10
        assert output.contents.bytes_contents[0] == word
    message.outputs[0].parameters["classification"].uint64_param = 99
    assert list(client.infer(message).outputs[0].shape) == [5, 10]  # there are no more


def test_a_version_and_parameters(client: Caller) -> None:
    message = request(blank())
    message.model_version = "1"
    message.parameters["timeout"].int64_param = 60_000_000
    message.parameters["priority"].uint64_param = 3
    message.parameters["sequence_start"].bool_param = True
    message.parameters["of no kind"].Clear()
    message.inputs[0].parameters["note"].double_param = float("nan")
    message.outputs.add(name="logits")
    assert list(client.infer(message).outputs[0].shape) == [1, 10]


def wrong(**changes: Any) -> Any:
    return request(blank(2), **changes)


def with_raw(*contents: bytes) -> Any:
    message = wrong()
    del message.raw_input_contents[:]
    message.raw_input_contents.extend(contents)
    return message


def with_contents(raw: bool = False, **contents: Any) -> Any:
    message = wrong(raw=raw)
    for kind, values in contents.items():
        field = getattr(message.inputs[0].contents, kind)
        del field[:]
        field.extend(values)
    return message


def with_output(*names: str, **parameters: Any) -> Any:
    message = wrong()
    for name in names:
        tensor = message.outputs.add(name=name)
        for key, value in parameters.items():
            kind = "string_param" if isinstance(value, str) else "int64_param"
            setattr(tensor.parameters[key], kind, value)
    return message


def with_parameter(name: str, kind: str, value: Any) -> Any:
    message = wrong()
    setattr(message.parameters[name], kind, value)
    return message


def two_inputs() -> Any:
    message = wrong()
    message.inputs.add().CopyFrom(message.inputs[0])
    message.raw_input_contents.append(message.raw_input_contents[0])
    return message


def in_shared_memory() -> Any:
    message = with_raw()
    message.inputs[0].parameters["shared_memory_region"].string_param = "x"
    return message


def identified(name: str) -> Any:
    message = wrong()
    message.id = name
    return message


WRONG: list[tuple[Any, str]] = [
    (wrong(name="pixels"), 'inputs holds ["pixels"]'),
    (two_inputs(), "the model has one input, 'images'"),
    (messages.ModelInferRequest(model_name="eps_resnet"), "inputs holds []"),
    (wrong(datatype="FP32"), "raw pixels 0 to 255"),
    (wrong(datatype=""), "UINT8"),
    (wrong(shape=[2, 8, 8]), "not [2, 8, 8]"),
    (wrong(shape=[2, 1, 8, 9]), "not [2, 1, 8, 9]"),
    (wrong(shape=[0, 1, 8, 8]), "not [0, 1, 8, 8]"),
    (wrong(shape=[-1, 1, 8, 8]), "not [-1, 1, 8, 8]"),
    (wrong(shape=[1 << 62, 1, 8, 8]), "up to 256 images"),
    (wrong(shape=[257, 1, 8, 8]), "up to 256 images"),
    (wrong(shape=[1] * 10_000), "..."),
    (with_raw(b"x" * 127), "has 128 bytes, not 127"),
    (with_raw(b"x" * 129), "has 128 bytes, not 129"),
    (with_raw(b""), "has 128 bytes, not 0"),
    (with_raw(bytes(128), b""), "holds 2 tensors"),
    (with_raw(), "needs its pixels in raw_input_contents"),
    (with_contents(raw=True, uint_contents=[0] * 128), "both contents and raw_input_contents"),
    (with_contents(uint_contents=[0] * 127), "128 pixels, not 127"),
    (with_contents(uint_contents=[0] * 127 + [256]), "between 0 and 255"),
    (with_contents(uint_contents=[0] * 127 + [2**32 - 1]), "between 0 and 255"),
    (with_contents(uint_contents=[], int_contents=[0] * 128), "contents.uint_contents"),
    (with_contents(bytes_contents=[b"x"]), "contents.uint_contents"),
    (in_shared_memory(), "shared memory"),
    (with_output("softmax"), "one output, 'logits'"),
    (with_output("logits", "logits"), "one output, 'logits'"),
    (with_output("logits", classification=-1), "classification"),
    (with_output("logits", classification="3"), "classification"),
    (with_output("logits", shared_memory_region="x"), "shared memory"),
    (with_parameter("timeout", "int64_param", -1), "timeout"),
    (with_parameter("timeout", "string_param", "1s"), "timeout"),
    (with_parameter("timeout", "bool_param", True), "timeout"),
    (with_parameter("timeout", "uint64_param", 1 << 63), "timeout"),
    (identified("x" * 257), "id: expected `str` of length <= 256"),
    (b"\x0a", "no ModelInferRequest"),
    (b"\x0a\x01\xff", "no ModelInferRequest"),  # a name that is not UTF-8
    (b"\x2a\x00" * 257, "more than 256 fields"),
    (wrong().SerializeToString()[:-1], "no ModelInferRequest"),
]


@pytest.mark.parametrize(("message", "told"), WRONG, ids=range(len(WRONG)))
def test_error_messages(client: Caller, message: Any, told: str) -> None:
    error = client.refused(message)
    assert error.code() is CODE.INVALID_ARGUMENT
    assert told in error.details()
    assert len(error.details()) < 400


def test_another_model_or_version(client: Caller) -> None:
    message = wrong()
    message.model_name = "other"
    error = client.refused(message)
    assert (error.code(), "one, 'eps_resnet'" in error.details()) == (CODE.NOT_FOUND, True)
    message = wrong()
    message.model_version = "2"
    assert client.refused(message).code() is CODE.NOT_FOUND
    assert client.refused(b"").code() is CODE.NOT_FOUND  # names no model


def test_messages_that_only_name_a_model(client: Caller) -> None:
    def metadata(name: str) -> Any:
        content = messages.ModelMetadataRequest(name=name).SerializeToString()
        return messages.ModelMetadataResponse.FromString(client.send("ModelMetadata", content))

    told = metadata("eps_resnet")
    assert (told.platform, list(told.versions)) == ("onnxruntime_onnx", ["1"])
    assert list(told.inputs[0].shape) == [-1, 1, 8, 8]
    for name, code in (("other", CODE.NOT_FOUND), ("x" * 70_000, CODE.RESOURCE_EXHAUSTED)):
        with pytest.raises(grpc.RpcError) as caught:
            metadata(name)
        assert caught.value.code() is code
    with pytest.raises(grpc.RpcError, match="no ModelMetadataRequest"):
        client.send("ModelReady", b"\x0a")
