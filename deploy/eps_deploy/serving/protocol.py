"""KServe v2 (Open Inference Protocol): validation of requests, encoding of answers, API errors.

Pure functions, from bytes and to bytes. HTTP uses all of them; gRPC hands its messages over in the
form of the protocol's JSON. Sources: the protocol's `inference_rest.md`; Triton's
`extension_binary_data.md` (tensors as raw little-endian bytes after the JSON, whose length is in
the header Inference-Header-Content-Length) and `extension_classification.md` (`"parameters":
{"classification": k}` of an output).
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct

from eps_core.errors import EpsError, one_line
from eps_core.preprocessing import Preprocessing
from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Images, Logits

T = TypeVar("T")
Shape = tuple[int, ...]

# -- API errors. Their messages name no path of this machine


class ApiError(EpsError):
    """A request is answered with an error: `{"error": message}`, and this status of HTTP.

    Args:
        message: one line for the client.
        reason: short name, for metrics and logs.
        retry_after: seconds after which to retry; None: a retry does not help.
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
    """The server cannot answer this now, but later (RFC 9110, 15.6.4)."""
    return ApiError(message, status=503, reason=reason, retry_after=retry_after)


class InferenceFailed(ApiError):
    """The engine failed at a valid request."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=500, reason="engine")


# -- Validation of an inference request, the same for HTTP and gRPC

DATATYPE = "UINT8"
_MAX_TOLD = 80  # characters of a wrong value in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """Name, input and output of the model.

    `input_shape` is the shape `[C, H, W]` of one image, `max_images` what one request may hold.
    """

    name: str
    version: str
    input_shape: tuple[int, int, int]
    labels: tuple[str, ...]
    max_images: int

    def check(self, name: str, version: str) -> None:
        """Raise ApiError (404) when a request names another model or version."""
        if name != self.name:
            raise not_found(f"unknown model; this server has one, {self.name!r}")
        if version != self.version:
            raise not_found(f"unknown version; {self.name!r} has one, {self.version!r}")


def server_metadata(*extensions: str) -> dict[str, Any]:
    return {"name": "eps-serve", "version": version("eps-resnet"), "extensions": list(extensions)}


@dataclass(frozen=True, kw_only=True, slots=True)
class InferRequest:
    """A valid inference request.

    Attributes:
        images: uint8 `[N, C, H, W]`, N at least 1; a view of the body where that is possible.
        id: repeated in the answer; "" for none.
        binary: whether the logits are returned as raw bytes.
        classification: labels to return for each image in place of logits; 0: the logits.
        timeout: seconds that the answer may take; None: any time.
    """

    images: Images
    id: str = ""
    binary: bool = False
    classification: int = 0
    timeout: float | None = None


# The request as the client sends it. A field that is null counts as absent.


class RequestParameters(Struct):
    timeout: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None  # microseconds, as Triton
    binary_data_output: bool | None = None


class InputParameters(Struct):
    binary_data_size: int | None = None
    shared_memory_region: Any = None


class OutputParameters(Struct):
    binary_data: bool | None = None
    classification: Annotated[int, Meta(ge=0)] | None = None
    shared_memory_region: Any = None


class InputTensor(Struct):
    name: Any = None
    datatype: Any = None
    shape: Any = None
    data: Any = None
    parameters: InputParameters | None = None


class RequestedOutput(Struct):
    name: Any = None
    parameters: OutputParameters | None = None


class InferDocument(Struct):
    id: Annotated[str, Meta(max_length=256)] | None = None
    parameters: RequestParameters | None = None
    inputs: list[InputTensor] | None = None
    outputs: list[RequestedOutput] | None = None


def convert(document: Any, kind: type[T]) -> T:
    """Convert plain data into a record. Raises ApiError with the field that is wrong."""
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        raise ApiError(f"{path.rstrip('`')}: {what[0].lower()}{what[1:]}") from None


def validate(
    document: dict[str, Any], read_pixels: Callable[[InputTensor, Shape], Images], model: Signature
) -> InferRequest:
    """Validate an inference request in the form of the protocol's JSON.

    `read_pixels` returns the images of the one input, whose name, datatype and shape are right.

    Raises ApiError: not a request for this model; the message says what is wrong and where.
    """
    given = convert(document, InferDocument)
    identifier = given.id or ""
    try:
        identifier.encode()
    except UnicodeEncodeError:
        raise ApiError("id holds half of a surrogate pair") from None
    parameters = given.parameters or RequestParameters()
    binary, classification = parameters.binary_data_output or False, 0
    if given.outputs:
        names = [output.name for output in given.outputs]
        if names != [OUTPUT_NAME]:
            raise ApiError(
                f"outputs asks for {shorten(names)}; the model has one output, {OUTPUT_NAME!r}"
            )
        wanted = given.outputs[0].parameters or OutputParameters()
        _reject_shared_memory(wanted)
        binary = binary if wanted.binary_data is None else wanted.binary_data
        classification = min(wanted.classification or 0, len(model.labels))
    inputs = given.inputs or []
    names = [tensor.name for tensor in inputs]
    if names != [INPUT_NAME]:
        raise ApiError(f"inputs holds {shorten(names)}; the model has one input, {INPUT_NAME!r}")
    (tensor,) = inputs
    if tensor.datatype != DATATYPE:
        raise ApiError(
            f"the datatype of {INPUT_NAME!r} is {DATATYPE}, raw pixels 0 to 255,"
            f" not {shorten(tensor.datatype)}"
        )
    shape = _check_shape(tensor.shape, model)
    _reject_shared_memory(tensor.parameters)
    return InferRequest(
        images=read_pixels(tensor, shape),
        id=identifier,
        binary=binary,
        classification=classification,
        timeout=parameters.timeout / 1e6 if parameters.timeout else None,
    )


def _check_shape(value: Any, model: Signature) -> Shape:
    sizes = value if isinstance(value, list) else []
    whole = all(type(size) is int for size in sizes)  # True would pass for 1
    if not whole or sizes[1:] != list(model.input_shape) or sizes[0] < 1:
        wanted = ", ".join(map(str, model.input_shape))
        raise ApiError(f"the shape of {INPUT_NAME!r} is [N, {wanted}], not {shorten(value)}")
    if sizes[0] > model.max_images:
        raise ApiError(f"one request may hold up to {model.max_images} images")
    return tuple(sizes)


def _reject_shared_memory(parameters: InputParameters | OutputParameters | None) -> None:
    if parameters is not None and parameters.shared_memory_region is not None:
        raise ApiError("this server has no shared memory; send the tensor in the body")


def shorten(value: Any) -> str:
    """A value that the client sent, short enough for a message."""
    if isinstance(value, list):
        value = value[:_MAX_TOLD]  # there may be millions
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _MAX_TOLD else f"{text[: _MAX_TOLD - 3]}..."


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """The output tensor of an answer, of datatype and shape in the protocol's words.

    `classes` is `score:index:label` in UTF-8, best first, image by image; None: logits are wanted.
    """

    datatype: str
    shape: Shape
    logits: Logits
    classes: list[bytes] | None

    def raw(self) -> bytes:
        """The tensor as little-endian bytes; each string follows its length."""
        if self.classes is None:
            return np.ascontiguousarray(self.logits, dtype="<f4").tobytes()
        return b"".join(struct.pack("<I", len(text)) + text for text in self.classes)


def output_tensor(request: InferRequest, logits: Logits, model: Signature) -> OutputTensor:
    """The output that a request asks for."""
    count = request.classification
    if not count:
        return OutputTensor("FP32", logits.shape, logits, None)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    classes = [
        f"{logits[row, index]:f}:{index}:{model.labels[index]}".encode()
        for row, indices in enumerate(order.tolist())
        for index in indices
    ]
    return OutputTensor("BYTES", (len(logits), count), logits, classes)


# -- Pixels: raw bytes, or numbers, nested or flat


def pixels_from_bytes(content: memoryview, shape: Shape) -> Images:
    """Row-major pixels as they are, without a copy. Raises ApiError: another number of them."""
    wanted = math.prod(shape)
    if len(content) != wanted:
        raise ApiError(
            f"{INPUT_NAME!r} of shape {list(shape)} has {wanted} bytes, not {len(content)}"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def pixels_from_json(data: Any, shape: Shape) -> Images:
    """Pixels from JSON's lists. Raises ApiError: another shape, or not all integers 0 to 255."""
    if not isinstance(data, list):
        raise ApiError(f"{INPUT_NAME!r} needs data, a list of pixels, or binary_data_size")
    flat = _flatten(data, shape) if data and isinstance(data[0], list) else data
    _check_count(len(flat), shape)
    if set(map(type, flat)) != {int}:  # True would pass for 1
        raise ApiError(f"the pixels of {INPUT_NAME!r} must be whole numbers")
    return pixels_from_integers(flat, shape)


def pixels_from_integers(numbers: Sequence[int], shape: Shape) -> Images:
    """Pixels from a flat sequence. Raises ApiError: another number of them, or out of range."""
    _check_count(len(numbers), shape)
    try:
        pixels = bytes(numbers)
    except ValueError:
        raise ApiError(f"the pixels of {INPUT_NAME!r} must lie between 0 and 255") from None
    return np.frombuffer(pixels, dtype=np.uint8).reshape(shape)


def _check_count(count: int, shape: Shape) -> None:
    wanted = math.prod(shape)
    if count != wanted:
        raise ApiError(f"{INPUT_NAME!r} of shape {list(shape)} has {wanted} pixels, not {count}")


def _flatten(data: list[Any], shape: Shape) -> list[Any]:
    level: list[Any] = [data]
    for axis, size in enumerate(shape):
        if not all(type(part) is list and len(part) == size for part in level):
            raise ApiError(
                f"the data of {INPUT_NAME!r} must be nested as its shape {list(shape)} says,"
                f" or flat; axis {axis} is not"
            )
        level = list(chain.from_iterable(level))
    return level


# -- Requests and answers of HTTP

JSON_LENGTH = "Inference-Header-Content-Length"


def read_request(body: bytes, json_length: int | None, model: Signature) -> InferRequest:
    """Parse and validate the body of an infer request.

    `json_length` is the value of the header Inference-Header-Content-Length; 0: the body is one
    image's raw pixels and nothing else. Raises the errors of :func:`validate`.
    """
    if json_length == 0:
        pixels = pixels_from_bytes(memoryview(body), (1, *model.input_shape))
        return InferRequest(images=pixels, binary=True)
    if json_length is not None and not 0 < json_length <= len(body):
        raise ApiError(f"{JSON_LENGTH} is {json_length}, the body has {len(body)} bytes")
    document = parse_json(body[:json_length])
    rest = memoryview(body)[len(body) if json_length is None else json_length :]

    def read_pixels(tensor: InputTensor, shape: Shape) -> Images:
        size = (tensor.parameters or InputParameters()).binary_data_size
        if size is None:
            if len(rest):
                raise ApiError(f"{len(rest)} bytes after the JSON belong to no tensor")
            return pixels_from_json(tensor.data, shape)
        if tensor.data is not None:
            raise ApiError(f"{INPUT_NAME!r} has both data and binary_data_size")
        if size != len(rest):
            raise ApiError(
                f"binary_data_size is {shorten(size)}, and {len(rest)} bytes follow the JSON"
                f" (its length is in {JSON_LENGTH})"
            )
        return pixels_from_bytes(rest, shape)

    return validate(document, read_pixels, model)


def parse_json(text: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ApiError."""
    try:
        document = json.loads(text, parse_constant=_reject_constant)
    except UnicodeDecodeError:
        raise ApiError("the body is not JSON: not UTF-8") from None
    except RecursionError:
        raise ApiError("the body is not JSON that is accepted: nested too deeply") from None
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ApiError("the body must be a JSON object")
    return document


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def write_answer(
    request: InferRequest, logits: Logits, model: Signature
) -> tuple[bytes, int | None]:
    """Return the answer's body, and the length of its JSON if raw bytes follow.

    `logits`: float32 `[N, classes]`, finite.
    """
    output = output_tensor(request, logits, model)
    tensor: dict[str, Any] = {
        "name": OUTPUT_NAME,
        "datatype": output.datatype,
        "shape": list(output.shape),
    }
    raw = output.raw() if request.binary else b""
    if request.binary:
        tensor["parameters"] = {"binary_data_size": len(raw)}
    elif output.classes is not None:
        tensor["data"] = [text.decode() for text in output.classes]
    else:
        # Doubles that equal the float32 ones, so that a client's float32 are the engine's.
        tensor["data"] = logits.ravel().tolist()
    answer: dict[str, Any] = {
        "model_name": model.name,
        "model_version": model.version,
        "outputs": [tensor],
    }
    if request.id:
        answer["id"] = request.id
    text = json.dumps(answer, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    return (text + raw, len(text)) if request.binary else (text, None)


# -- Parsing requests without blocking the event loop

_INLINE_BYTES = 256 << 10  # parsed on the event loop; more would block every client


async def parse_request(
    work: Callable[[], InferRequest],
    size: int,
    *,
    limit: int,
    workers: Executor,
    told: tuple[str, str],
) -> InferRequest:
    """Return the result of `work`, which parses `size` bytes; many are parsed by the `workers`.

    Raises ApiError: more than `limit` bytes, beside raw tensors: a parsed number takes far more
    memory. `told` is what is parsed, and where to send the tensor instead.
    """
    if size > limit:
        raise too_large(
            f"{size} bytes {told[0]}; at most {limit} are accepted: send the tensor {told[1]}"
        )
    if size <= _INLINE_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(workers, work)


# -- Images: JPEG, PNG or WebP, decoded within limits

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")


def decode_image(content: bytes, preprocessing: Preprocessing, max_pixels: int) -> Images:
    """Decode an image to the network's input, uint8 `[1, C, H, W]`, as evaluation in training does.

    Its size and scaled size are checked by the image's header, before a pixel is decoded.

    Raises:
        ApiError: another format, damaged, or more than `max_pixels`, scaled or not.
    """
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise ApiError("the body is empty; send the image's bytes")
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            _check_size(image.width, image.height, preprocessing, max_pixels)
            return preprocessing.apply(image)[None]
    except ApiError:
        raise
    except UnidentifiedImageError:
        raise ApiError("not a JPEG, PNG or WebP image; send its bytes as the body") from None
    except Exception as error:  # Pillow's decoders raise many types for what is damaged
        reason = one_line(error)[:200]
        raise ApiError(f"the image cannot be decoded: {reason}") from None


def _check_size(width: int, height: int, preprocessing: Preprocessing, most: int) -> None:
    if width * height > most:
        raise ApiError(f"the image has {width} x {height} pixels; at most {most} are accepted")
    for across, down in ((width, height), (height, width)):  # EXIF may rotate it
        if math.prod(preprocessing.scaled(down, across)) > most:
            raise ApiError(
                f"the image has {width} x {height} pixels, too long and thin: scaled for the"
                f" network it would have more than the {most} that are accepted"
            )
