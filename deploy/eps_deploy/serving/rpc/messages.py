"""The protocol's messages as pure functions: from bytes, and to bytes.

Source: the protocol's `open_inference_grpc.proto`, of which Triton's messages are a superset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from open_inference.grpc import protocol

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Images, Logits
from eps_deploy.serving import protocol as tensors
from eps_deploy.serving.protocol import (
    ApiError,
    Request,
    Shape,
    Signature,
    Tensor,
    output,
    understand,
)

_MOST_AXES = 40  # of those that are looked at: more are wrong, and there may be millions

M = TypeVar("M")


def read_infer(rest: bytes, raw: Sequence[memoryview], signature: Signature) -> Request:
    """Parse a ModelInferRequest.

    Args:
        rest: the message without its raw tensors.
        raw: its field `raw_input_contents`.
        signature: of the model.

    Raises:
        Refusal: anything that is not a request for this model; it says what and where.
    """
    message = _parse(protocol.ModelInferRequest, rest)
    signature.check(message.model_name, message.model_version or signature.version)
    document = {
        "id": message.id,
        "parameters": _parameters(message.parameters),
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape[:_MOST_AXES]),
                "parameters": _parameters(tensor.parameters),
            }
            for tensor in message.inputs
        ],
        "outputs": [
            {"name": tensor.name, "parameters": _parameters(tensor.parameters)}
            for tensor in message.outputs
        ],
    }
    request = understand(document, partial(_pixels, message, raw), signature)
    # As the request is, so is the answer: Triton answers in raw bytes always, KServe and MLServer
    # like this, and who sends numbers may have no code for bytes.
    return replace(request, binary=bool(raw))


def _pixels(
    message: protocol.ModelInferRequest, raw: Sequence[memoryview], tensor: Tensor, shape: Shape
) -> Images:
    contents = message.inputs[0].contents
    given = [field.name for field, _ in contents.ListFields()]
    if raw:
        if given:
            raise ApiError(f"{INPUT_NAME!r} has both contents and raw_input_contents")
        if len(raw) != 1:
            raise ApiError(f"raw_input_contents holds {len(raw)} tensors, and inputs one")
        return tensors.from_bytes(raw[0], shape)
    if given != ["uint_contents"]:
        raise ApiError(
            f"{INPUT_NAME!r} needs its pixels in raw_input_contents, or in contents.uint_contents"
        )
    return tensors.from_numbers(contents.uint_contents, shape)


def _parameters(given: Mapping[str, protocol.InferParameter]) -> dict[str, Any]:
    return {name: _value(parameter) for name, parameter in given.items()}


def _value(parameter: protocol.InferParameter) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, kind) if kind is not None else None


def write_infer(request: Request, logits: Logits, signature: Signature) -> bytes:
    """A ModelInferResponse."""
    found = output(request, logits, signature)
    response = protocol.ModelInferResponse(
        model_name=signature.name, model_version=signature.version, id=request.id
    )
    tensor = response.outputs.add(name=OUTPUT_NAME, datatype=found.datatype, shape=found.shape)
    if request.binary:
        response.raw_output_contents.append(found.raw())
    elif found.words is not None:
        tensor.contents.bytes_contents.extend(found.words)
    else:
        tensor.contents.fp32_contents.extend(logits.ravel().tolist())
    return _encoded(response)


def read_model(content: bytes) -> tuple[str, str]:
    """Name and version in a ModelReadyRequest or a ModelMetadataRequest, which look the same.

    Version "": any. Raises Refusal.
    """
    message = _parse(protocol.ModelMetadataRequest, content)
    return message.name, message.version


def live(live: bool) -> bytes:
    return _encoded(protocol.ServerLiveResponse(live=live))


def ready(ready: bool) -> bytes:
    """A ServerReadyResponse, or a ModelReadyResponse, which looks the same."""
    return _encoded(protocol.ServerReadyResponse(ready=ready))


def server_metadata(told: Mapping[str, Any]) -> bytes:
    """Args: told: as `descriptions.server` has it."""
    return _encoded(protocol.ServerMetadataResponse(**told))


def model_metadata(told: Mapping[str, Any]) -> bytes:
    """Args: told: as `descriptions.model` has it."""
    return _encoded(protocol.ModelMetadataResponse(**told))


def _parse(kind: type[M], content: bytes) -> M:
    message: Any = kind()
    try:
        message.ParseFromString(content)
    except DecodeError:
        raise ApiError(
            f"the message is no {kind.__name__} of the Open Inference Protocol"
        ) from None
    parsed: M = message
    return parsed


def _encoded(message: Any) -> bytes:
    encoded: bytes = message.SerializeToString()
    return encoded
