"""KServe v2 (Open Inference Protocol) over HTTP as pure functions: from bytes, and to bytes.

Sources: the protocol's `inference_rest.md`; Triton's `extension_binary_data.md` (tensors as raw
little-endian bytes after the JSON, whose length is in the header Inference-Header-Content-Length)
and `extension_classification.md` (`"parameters": {"classification": k}` of an output).
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any, NoReturn

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Images, Logits
from eps_deploy.serving import tensors
from eps_deploy.serving.contract import (
    Request,
    Shape,
    Signature,
    Tensor,
    mapping,
    output,
    told,
    understand,
)
from eps_deploy.serving.refusals import Refusal

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
        pixels = tensors.from_bytes(memoryview(body), (1, *signature.input_shape))
        return Request(images=pixels, binary=True)
    if json_length is not None and not 0 < json_length <= len(body):
        raise Refusal(f"{JSON_LENGTH} is {json_length}, the body has {len(body)} bytes")
    document = parse_json(body if json_length is None else body[:json_length])
    rest = memoryview(body)[len(body) if json_length is None else json_length :]
    return understand(document, partial(_pixels, rest), signature)


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


def _pixels(rest: memoryview, tensor: Tensor, shape: Shape) -> Images:
    size = mapping(tensor.get("parameters"), "inputs[0].parameters").get("binary_data_size")
    if size is None:
        if len(rest):
            raise Refusal(f"{len(rest)} bytes after the JSON belong to no tensor")
        return tensors.from_json(tensor.get("data"), shape)
    if tensor.get("data") is not None:
        raise Refusal(f"{INPUT_NAME!r} has both data and binary_data_size")
    if isinstance(size, bool) or not isinstance(size, int) or size != len(rest):
        raise Refusal(
            f"binary_data_size is {told(size)}, and {len(rest)} bytes follow the JSON"
            f" (whose length stands in {JSON_LENGTH})"
        )
    return tensors.from_bytes(rest, shape)


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
