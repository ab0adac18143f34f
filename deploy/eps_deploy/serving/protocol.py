"""KServe v2 (Open Inference Protocol) over HTTP as pure functions: from bytes, and to bytes.

Sources: the protocol's `inference_rest.md`; Triton's `extension_binary_data.md` (tensors as raw
little-endian bytes after the JSON, whose length is in the header Inference-Header-Content-Length)
and `extension_classification.md` (`"parameters": {"classification": k}` of an output).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Images, Logits
from eps_deploy.serving import tensors
from eps_deploy.serving.refusals import InferenceFailed, Refusal

JSON_LENGTH = "Inference-Header-Content-Length"
DATATYPE = "UINT8"
_MOST_LETTERS = 256  # of an `id`: it goes into answers and logs


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """What a client must know of the model.

    Attributes:
        name, version: as they stand in paths.
        input_shape: shape `[C, H, W]` of one image.
        labels: names of the classes, by index.
        max_images: the most that one request may hold.
    """

    name: str
    version: str
    input_shape: tuple[int, int, int]
    labels: tuple[str, ...]
    max_images: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """An inference request.

    Attributes:
        images: uint8 `[N, C, H, W]`, N at least 1; a view of the body where that is possible.
        id: to be repeated in the answer; "" for none.
        binary: whether the logits go back as raw bytes.
        classification: how many labels an image gets in place of logits; 0: the logits.
        timeout: seconds that the answer may take; None: any time.
    """

    images: Images
    id: str = ""
    binary: bool = False
    classification: int = 0
    timeout: float | None = None


def read_request(body: bytes, json_length: int | None, signature: Signature) -> Request:
    """Parse the body of an infer request.

    Args:
        body: all of it.
        json_length: value of the header Inference-Header-Content-Length; None without one; 0: the
            body is one image's raw pixels and nothing else.
        signature: of the model.

    Raises:
        Refusal: anything that is not a request for this model; it says what and where.
    """
    if json_length == 0:
        pixels = tensors.from_bytes(memoryview(body), (1, *signature.input_shape))
        return Request(images=pixels, binary=True)
    if json_length is not None and not 0 < json_length <= len(body):
        raise Refusal(f"{JSON_LENGTH} is {json_length}, the body has {len(body)} bytes")
    document = parse_json(body if json_length is None else body[:json_length])
    parameters = _mapping(document.get("parameters"), "parameters")
    rest = memoryview(body)[len(body) if json_length is None else json_length :]
    binary, classification = _output(document.get("outputs"), parameters)
    return Request(
        images=_images(document.get("inputs"), rest, signature),
        id=_identifier(document.get("id", "")),
        binary=binary,
        classification=min(classification, len(signature.labels)),
        timeout=_timeout(parameters),
    )


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object. Raises Refusal."""
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise Refusal("the body is not JSON: not UTF-8") from None
    except RecursionError:
        raise Refusal("the body is not JSON that is accepted: nested too deeply") from None
    except ValueError as error:
        raise Refusal(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Refusal("the body must be a JSON object")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refusal(f"{name} must be an object")
    return value


def _identifier(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MOST_LETTERS:
        raise Refusal(f"id must be a string of at most {_MOST_LETTERS} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refusal("id holds half of a surrogate pair") from None
    return value


def _timeout(parameters: Mapping[str, Any]) -> float | None:
    """Seconds; Triton's unit in a request is the microsecond, and 0 means none."""
    value = parameters.get("timeout", 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise Refusal("parameters.timeout must be a number of microseconds, at least 0")
    return value / 1e6 if value else None


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise Refusal(f"parameters.{name} must be true or false")
    return value


def _output(outputs: Any, parameters: Mapping[str, Any]) -> tuple[bool, int]:
    """Whether the output is wanted as bytes, and how many classes of it."""
    binary = _flag(parameters, "binary_data_output", False)
    if outputs is None or outputs == []:
        return binary, 0
    if not isinstance(outputs, list) or not all(isinstance(item, dict) for item in outputs):
        raise Refusal("outputs must be a list of objects")
    names = [item.get("name") for item in outputs]
    if names != [OUTPUT_NAME]:
        raise Refusal(f"outputs asks for {_told(names)}; the model has one output, {OUTPUT_NAME!r}")
    wanted = _mapping(outputs[0].get("parameters"), "outputs[0].parameters")
    _refuse_shared_memory(wanted)
    count = wanted.get("classification", 0)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise Refusal("parameters.classification must be a number of classes")
    return _flag(wanted, "binary_data", binary), count


def _images(inputs: Any, rest: memoryview, signature: Signature) -> Images:
    if not isinstance(inputs, list) or not all(isinstance(item, dict) for item in inputs):
        raise Refusal("inputs must be a list of objects")
    names = [item.get("name") for item in inputs]
    if names != [INPUT_NAME]:
        raise Refusal(f"inputs holds {_told(names)}; the model has one input, {INPUT_NAME!r}")
    tensor = inputs[0]
    if tensor.get("datatype") != DATATYPE:
        raise Refusal(
            f"the datatype of {INPUT_NAME!r} is {DATATYPE}, raw pixels 0 to 255,"
            f" not {_told(tensor.get('datatype'))}"
        )
    shape = _shape(tensor.get("shape"), signature)
    parameters = _mapping(tensor.get("parameters"), "inputs[0].parameters")
    _refuse_shared_memory(parameters)
    size = parameters.get("binary_data_size")
    if size is None:
        if len(rest):
            raise Refusal(f"{len(rest)} bytes after the JSON belong to no tensor")
        return tensors.from_json(tensor.get("data"), shape)
    if "data" in tensor:
        raise Refusal(f"{INPUT_NAME!r} has both data and binary_data_size")
    if isinstance(size, bool) or not isinstance(size, int) or size != len(rest):
        raise Refusal(
            f"binary_data_size is {_told(size)}, and {len(rest)} bytes follow the JSON"
            f" (whose length stands in {JSON_LENGTH})"
        )
    return tensors.from_bytes(rest, shape)


def _shape(value: Any, signature: Signature) -> tuple[int, ...]:
    fixed = list(signature.input_shape)
    sizes = value if isinstance(value, list) else []
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    if not whole or len(sizes) != 4 or sizes[1:] != fixed or sizes[0] < 1:
        wanted = ", ".join(map(str, fixed))
        raise Refusal(f"the shape of {INPUT_NAME!r} is [N, {wanted}], not {_told(value)}")
    if sizes[0] > signature.max_images:
        raise Refusal(f"one request may hold up to {signature.max_images} images")
    return tuple(sizes)


def _refuse_shared_memory(parameters: Mapping[str, Any]) -> None:
    if "shared_memory_region" in parameters:
        raise Refusal("this server has no shared memory; send the tensor in the body")


def _told(value: Any) -> str:
    """What the client sent, short enough for a message."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write_answer(
    request: Request, logits: Logits, signature: Signature
) -> tuple[bytes, int | None]:
    """The answer's body, and its JSON's length if raw bytes follow.

    Raises InferenceFailed for logits that JSON has no numbers for.
    """
    output: dict[str, Any] = {"name": OUTPUT_NAME}
    raw = b""
    if request.classification:
        words = _classes(logits, request.classification, signature)
        output |= {"datatype": "BYTES", "shape": [len(logits), request.classification]}
        if request.binary:
            raw = b"".join(struct.pack("<I", len(word)) + word for word in words)
        else:
            output["data"] = [word.decode() for word in words]
    else:
        output |= {"datatype": "FP32", "shape": list(logits.shape)}
        if request.binary:
            raw = np.ascontiguousarray(logits, dtype="<f4").tobytes()
        else:
            output["data"] = _numbers(logits)
    if request.binary:
        output["parameters"] = {"binary_data_size": len(raw)}
    answer: dict[str, Any] = {
        "model_name": signature.name,
        "model_version": signature.version,
        "outputs": [output],
    }
    if request.id:
        answer["id"] = request.id
    text = json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()
    return (text + raw, len(text)) if request.binary else (text, None)


def _numbers(logits: Logits) -> list[float]:
    """Doubles that equal the float32 ones, so that a client's float32 are the engine's."""
    numbers: list[float] = logits.ravel().tolist()
    if not all(map(math.isfinite, numbers)):
        raise InferenceFailed("some logits are not finite, which JSON cannot say")
    return numbers


def _classes(logits: npt.NDArray[np.float32], count: int, signature: Signature) -> list[bytes]:
    """`score:index:label`, best first, image by image."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    return [
        f"{logits[row, index]:f}:{index}:{signature.labels[index]}".encode()
        for row, indices in enumerate(order.tolist())
        for index in indices
    ]
