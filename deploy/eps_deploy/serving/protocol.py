"""KServe v2 (Open Inference Protocol) over HTTP as pure functions: from bytes, and to bytes.

Sources: the protocol's `inference_rest.md`; Triton's `extension_binary_data.md` (tensors as raw
little-endian bytes after the JSON, whose length is in the header Inference-Header-Content-Length)
and `extension_classification.md` (`"parameters": {"classification": k}` of an output).
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import numpy as np

from eps_core.errors import EpsError
from eps_core.preprocessing import Preprocessing
from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Images, Logits

# -- What a client is refused, and with which HTTP status. Messages name no path of this machine


class ApiError(EpsError):
    """A request that gets an error for an answer: `{"error": message}`.

    Args:
        message: one line for whoever sent the request.
        status: of HTTP.
        reason: short name, for metrics and logs.
        retry_after: seconds after which to try again; None: trying again does not help.
        headers: further ones for the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        reason: str = "invalid",
        retry_after: int | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after
        self.headers = headers


def not_found(message: str) -> ApiError:
    return ApiError(message, status=404, reason="unknown")


def too_large(message: str) -> ApiError:
    return ApiError(message, status=413, reason="too-large")


def busy(message: str, *, reason: str, retry_after: int = 1) -> ApiError:
    """The server could answer this, but not now (RFC 9110, 15.6.4)."""
    return ApiError(message, status=503, reason=reason, retry_after=retry_after)


class InferenceFailed(EpsError):
    """The engine failed at a request that was right: the only error with status 500."""


def as_refusal(error: ApiError | InferenceFailed) -> ApiError:
    """What a client is told of it, on either wire."""
    if isinstance(error, ApiError):
        return error
    return ApiError(str(error), status=500, reason="engine")


# -- What a request for the network must hold, and what it gets, whichever wire it came on
#
# A request is read as a document in the form of the protocol's JSON (`inference_rest.md` of the
# Open Inference Protocol); how its pixels are found is the wire's own matter.

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
        raise ApiError(f"{name} must be an object")
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
        raise ApiError(f"id must be a string of at most {_MOST_LETTERS} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ApiError("id holds half of a surrogate pair") from None
    return value


def _timeout(parameters: Mapping[str, Any]) -> float | None:
    """Seconds; Triton's unit in a request is the microsecond, and 0 means none."""
    value = parameters.get("timeout", 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ApiError("parameters.timeout must be a number of microseconds, at least 0")
    return value / 1e6 if value else None


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise ApiError(f"parameters.{name} must be true or false")
    return value


def _output(outputs: Any, parameters: Mapping[str, Any]) -> tuple[bool, int]:
    """Whether the output is wanted as bytes, and how many classes of it."""
    binary = _flag(parameters, "binary_data_output", False)
    if outputs is None or outputs == []:
        return binary, 0
    if not isinstance(outputs, list) or not all(isinstance(item, dict) for item in outputs):
        raise ApiError("outputs must be a list of objects")
    names = [item.get("name") for item in outputs]
    if names != [OUTPUT_NAME]:
        raise ApiError(f"outputs asks for {told(names)}; the model has one output, {OUTPUT_NAME!r}")
    wanted = mapping(outputs[0].get("parameters"), "outputs[0].parameters")
    _refuse_shared_memory(wanted)
    count = wanted.get("classification", 0)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ApiError("parameters.classification must be a number of classes")
    return _flag(wanted, "binary_data", binary), count


def _input(inputs: Any, signature: Signature) -> tuple[Tensor, Shape]:
    if not isinstance(inputs, list) or not all(isinstance(item, dict) for item in inputs):
        raise ApiError("inputs must be a list of objects")
    names = [item.get("name") for item in inputs]
    if names != [INPUT_NAME]:
        raise ApiError(f"inputs holds {told(names)}; the model has one input, {INPUT_NAME!r}")
    tensor = inputs[0]
    if tensor.get("datatype") != DATATYPE:
        raise ApiError(
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
        raise ApiError(f"the shape of {INPUT_NAME!r} is [N, {wanted}], not {told(value)}")
    if sizes[0] > signature.max_images:
        raise ApiError(f"one request may hold up to {signature.max_images} images")
    return tuple(sizes)


def _refuse_shared_memory(parameters: Mapping[str, Any]) -> None:
    if "shared_memory_region" in parameters:
        raise ApiError("this server has no shared memory; send the tensor in the body")


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


# -- Parsing requests without holding up the event loop

_INLINE = 256 << 10  # bytes that are parsed at once; more would hold up everybody


class Parser:
    """Parses small requests at once and large ones on a thread.

    Args:
        workers: for the large ones.
        limit: bytes to be parsed, beside raw tensors: a parsed number takes far more memory.
        form: what is parsed, and where the tensor goes instead, for those who send too much.
    """

    def __init__(self, workers: Executor, limit: int, form: tuple[str, str]) -> None:
        self._workers = workers
        self._limit = limit
        self._form = form

    async def parse(self, size: int, work: Callable[[], Request]) -> Request:
        """What `work` makes of `size` bytes. Raises Refusal: too many, or what `work` raises."""
        if size > self._limit:
            what, instead = self._form
            raise too_large(
                f"{size} bytes {what}; at most {self._limit} are accepted:"
                f" send the tensor {instead}"
            )
        if size <= _INLINE:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)


# -- A picture in a request: JPEG, PNG or WebP, decoded within limits

FORMATS = ("JPEG", "PNG", "WEBP")


def decode(content: bytes, preprocessing: Preprocessing, max_pixels: int) -> Images:
    """The network's input uint8 `[1, C, H, W]`, as training's evaluation would have it.

    Size and scaled size are known from the picture's header, before a pixel is decoded.

    Raises:
        Refusal: another format, damaged, or more than `max_pixels`, scaled or not.
    """
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise ApiError("the body is empty; send the picture's bytes")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(image.width, image.height, preprocessing, max_pixels)
            return preprocessing.apply(image)[None]
    except ApiError:
        raise
    except UnidentifiedImageError:
        raise ApiError("not a JPEG, PNG or WebP picture; send its bytes as the body") from None
    except Exception as error:  # Pillow's decoders raise many types for what is damaged
        raise ApiError(f"the picture cannot be decoded: {_line(error)}") from None


def _check_size(width: int, height: int, preprocessing: Preprocessing, most: int) -> None:
    if width * height > most:
        raise ApiError(f"the picture has {width} x {height} pixels; at most {most} are accepted")
    for across, down in ((width, height), (height, width)):  # it may lie on its side
        scale = max(preprocessing.resize[0] / down, preprocessing.resize[1] / across)
        if across * scale * down * scale > most:
            raise ApiError(
                f"the picture has {width} x {height} pixels, too long and thin: scaled for the"
                f" network it would have more than the {most} that are accepted"
            )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# -- Pixels from a request: raw bytes, or numbers, nested or flat


def from_bytes(content: memoryview, shape: tuple[int, ...]) -> Images:
    """Row-major pixels as they are, without a copy. Raises Refusal for another number of them."""
    wanted = math.prod(shape)
    if len(content) != wanted:
        raise ApiError(
            f"{INPUT_NAME!r} of shape {list(shape)} has {wanted} bytes, not {len(content)}"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def from_json(data: Any, shape: tuple[int, ...]) -> Images:
    """Pixels from JSON's lists. Raises Refusal for another shape, or what is no whole 0..255."""
    if not isinstance(data, list):
        raise ApiError(f"{INPUT_NAME!r} needs data, a list of pixels, or binary_data_size")
    flat = _flat(data, shape) if data and isinstance(data[0], list) else data
    _check_count(len(flat), shape)
    if set(map(type, flat)) != {int}:  # True would pass for 1
        raise ApiError(f"the pixels of {INPUT_NAME!r} must be whole numbers")
    return from_numbers(flat, shape)


def from_numbers(numbers: Sequence[int], shape: tuple[int, ...]) -> Images:
    """Pixels from a flat row of numbers. Raises Refusal for another number of them, or range."""
    _check_count(len(numbers), shape)
    try:
        pixels = bytes(numbers)
    except ValueError:
        raise ApiError(f"the pixels of {INPUT_NAME!r} must lie between 0 and 255") from None
    return np.frombuffer(pixels, dtype=np.uint8).reshape(shape)


def _check_count(count: int, shape: tuple[int, ...]) -> None:
    wanted = math.prod(shape)
    if count != wanted:
        raise ApiError(f"{INPUT_NAME!r} of shape {list(shape)} has {wanted} pixels, not {count}")


def _flat(data: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """The numbers of nested lists that have this very shape."""
    level: list[Any] = [data]
    for axis, size in enumerate(shape):
        if not all(type(part) is list and len(part) == size for part in level):
            raise ApiError(
                f"the data of {INPUT_NAME!r} must be nested as its shape {list(shape)} says,"
                f" or flat; axis {axis} is not"
            )
        level = list(chain.from_iterable(level))
    return level


JSON_LENGTH = "Inference-Header-Content-Length"


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
        pixels = from_bytes(memoryview(body), (1, *signature.input_shape))
        return Request(images=pixels, binary=True)
    if json_length is not None and not 0 < json_length <= len(body):
        raise ApiError(f"{JSON_LENGTH} is {json_length}, the body has {len(body)} bytes")
    document = parse_json(body if json_length is None else body[:json_length])
    rest = memoryview(body)[len(body) if json_length is None else json_length :]
    return understand(document, partial(_pixels, rest), signature)


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object. Raises Refusal."""
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise ApiError("the body is not JSON: not UTF-8") from None
    except RecursionError:
        raise ApiError("the body is not JSON that is accepted: nested too deeply") from None
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ApiError("the body must be a JSON object")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _pixels(rest: memoryview, tensor: Tensor, shape: Shape) -> Images:
    size = mapping(tensor.get("parameters"), "inputs[0].parameters").get("binary_data_size")
    if size is None:
        if len(rest):
            raise ApiError(f"{len(rest)} bytes after the JSON belong to no tensor")
        return from_json(tensor.get("data"), shape)
    if tensor.get("data") is not None:
        raise ApiError(f"{INPUT_NAME!r} has both data and binary_data_size")
    if isinstance(size, bool) or not isinstance(size, int) or size != len(rest):
        raise ApiError(
            f"binary_data_size is {told(size)}, and {len(rest)} bytes follow the JSON"
            f" (whose length stands in {JSON_LENGTH})"
        )
    return from_bytes(rest, shape)


def write_answer(
    request: Request, logits: Logits, signature: Signature
) -> tuple[bytes, int | None]:
    """The answer's body, and its JSON's length if raw bytes follow.

    Args:
        logits: float32 `[N, classes]`, finite.
    """
    found = output(request, logits, signature)
    tensor: dict[str, Any] = {
        "name": OUTPUT_NAME,
        "datatype": found.datatype,
        "shape": list(found.shape),
    }
    raw = b""
    if request.binary:
        raw = found.raw()
        tensor["parameters"] = {"binary_data_size": len(raw)}
    elif found.words is not None:
        tensor["data"] = [word.decode() for word in found.words]
    else:
        # Doubles that equal the float32 ones, so that a client's float32 are the engine's.
        tensor["data"] = logits.ravel().tolist()
    answer: dict[str, Any] = {
        "model_name": signature.name,
        "model_version": signature.version,
        "outputs": [tensor],
    }
    if request.id:
        answer["id"] = request.id
    text = json.dumps(answer, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    return (text + raw, len(text)) if request.binary else (text, None)
