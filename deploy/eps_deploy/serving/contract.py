"""What a request for the network must hold, and what it gets, whichever wire it came on.

A request is read as a document in the form of the protocol's JSON (`inference_rest.md` of the Open
Inference Protocol); how its pixels are found is the wire's own matter.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Images, Logits
from eps_deploy.serving.refusals import Refusal, not_found

DATATYPE = "UINT8"
_MOST_LETTERS = 256  # of an `id`: it goes into answers and logs
_MOST_TOLD = 80  # letters of what was wrong

Tensor = Mapping[str, Any]
Shape = tuple[int, ...]


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

    def check(self, name: str, version: str) -> None:
        """Raise Refusal (404) when a request names another model or version."""
        if name != self.name:
            raise not_found(f"unknown model; this server has one, {self.name!r}")
        if version != self.version:
            raise not_found(f"unknown version; {self.name!r} has one, {self.version!r}")


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


def understand(
    document: Mapping[str, Any], pixels: Callable[[Tensor, Shape], Images], signature: Signature
) -> Request:
    """The request that a document is.

    Args:
        document: with `inputs`, and perhaps `id`, `parameters` and `outputs`.
        pixels: gives the images of the one input, once its name, datatype and shape are right.
        signature: of the model.

    Raises:
        Refusal: anything that is not a request for this model; it says what and where.
    """
    parameters = mapping(document.get("parameters"), "parameters")
    binary, classification = _output(document.get("outputs"), parameters)
    tensor, shape = _input(document.get("inputs"), signature)
    return Request(
        images=pixels(tensor, shape),
        id=_identifier(document.get("id")),
        binary=binary,
        classification=min(classification, len(signature.labels)),
        timeout=_timeout(parameters),
    )


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """The fields of `value` that are given: null means that one is not, as for `value` itself.

    Raises Refusal for anything but a mapping.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refusal(f"{name} must be an object")
    return {key: field for key, field in value.items() if field is not None}


def told(value: Any) -> str:
    """What the client sent, short enough for a message."""
    if isinstance(value, list):
        value = value[:_MOST_TOLD]  # there may be millions
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _MOST_TOLD else f"{text[: _MOST_TOLD - 3]}..."


def _identifier(value: Any) -> str:
    if value is None:
        return ""
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
        raise Refusal(f"outputs asks for {told(names)}; the model has one output, {OUTPUT_NAME!r}")
    wanted = mapping(outputs[0].get("parameters"), "outputs[0].parameters")
    _refuse_shared_memory(wanted)
    count = wanted.get("classification", 0)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise Refusal("parameters.classification must be a number of classes")
    return _flag(wanted, "binary_data", binary), count


def _input(inputs: Any, signature: Signature) -> tuple[Tensor, Shape]:
    if not isinstance(inputs, list) or not all(isinstance(item, dict) for item in inputs):
        raise Refusal("inputs must be a list of objects")
    names = [item.get("name") for item in inputs]
    if names != [INPUT_NAME]:
        raise Refusal(f"inputs holds {told(names)}; the model has one input, {INPUT_NAME!r}")
    tensor = inputs[0]
    if tensor.get("datatype") != DATATYPE:
        raise Refusal(
            f"the datatype of {INPUT_NAME!r} is {DATATYPE}, raw pixels 0 to 255,"
            f" not {told(tensor.get('datatype'))}"
        )
    shape = _shape(tensor.get("shape"), signature)
    _refuse_shared_memory(mapping(tensor.get("parameters"), "inputs[0].parameters"))
    return tensor, shape


def _shape(value: Any, signature: Signature) -> Shape:
    fixed = list(signature.input_shape)
    sizes = value if isinstance(value, list) else []
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    if not whole or len(sizes) != 4 or sizes[1:] != fixed or sizes[0] < 1:
        wanted = ", ".join(map(str, fixed))
        raise Refusal(f"the shape of {INPUT_NAME!r} is [N, {wanted}], not {told(value)}")
    if sizes[0] > signature.max_images:
        raise Refusal(f"one request may hold up to {signature.max_images} images")
    return tuple(sizes)


def _refuse_shared_memory(parameters: Mapping[str, Any]) -> None:
    if "shared_memory_region" in parameters:
        raise Refusal("this server has no shared memory; send the tensor in the body")


@dataclass(frozen=True, slots=True)
class Output:
    """The output tensor of an answer.

    Attributes:
        datatype, shape: in the protocol's words.
        logits: float32 `[N, classes]`.
        words: `score:index:label` in UTF-8, best first, image by image; None: logits are wanted.
    """

    datatype: str
    shape: tuple[int, ...]
    logits: Logits
    words: list[bytes] | None

    def raw(self) -> bytes:
        """The tensor as little-endian bytes, a word with its length before it."""
        if self.words is None:
            return np.ascontiguousarray(self.logits, dtype="<f4").tobytes()
        return b"".join(struct.pack("<I", len(word)) + word for word in self.words)


def output(request: Request, logits: Logits, signature: Signature) -> Output:
    """What a request asked for."""
    count = request.classification
    if not count:
        return Output("FP32", logits.shape, logits, None)
    return Output("BYTES", (len(logits), count), logits, _classes(logits, count, signature))


def _classes(logits: Logits, count: int, signature: Signature) -> list[bytes]:
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    return [
        f"{logits[row, index]:f}:{index}:{signature.labels[index]}".encode()
        for row, indices in enumerate(order.tolist())
        for index in indices
    ]
