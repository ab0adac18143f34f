"""JSON Schema of what is asked of the network, and of what it answers."""

from __future__ import annotations

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME
from eps_deploy.serving.contract import DATATYPE, Signature
from eps_deploy.serving.forms import (
    COUNT,
    FLAG,
    SHARE,
    STRING,
    Schema,
    exactly,
    list_of,
    of_length,
    or_null,
)

_PIXEL: Schema = {"type": "integer", "minimum": 0, "maximum": 255}


def infer_request(signature: Signature | None) -> Schema:
    output = {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {"const": OUTPUT_NAME},
            "parameters": {
                "type": ["object", "null"],
                "properties": {
                    "binary_data": {
                        **or_null(FLAG),
                        "description": "Answer with raw little-endian bytes.",
                    },
                    "classification": {
                        **or_null(COUNT),
                        "description": "Answer with the best so many labels; 0: with logits.",
                    },
                    "shared_memory_region": {"type": "null"},
                },
            },
        },
    }
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {
                **or_null(STRING),
                "maxLength": 256,
                "description": "Comes back in the answer.",
            },
            "inputs": of_length(1, {"anyOf": _tensors(signature)}),
            "outputs": or_null(list_of(output, maxItems=1)),
            "parameters": {
                "type": ["object", "null"],
                "properties": {
                    "timeout": {
                        **or_null(COUNT),
                        "exclusiveMaximum": 1 << 63,
                        "description": "Microseconds for the answer; 0: as many as it takes.",
                    },
                    "binary_data_output": or_null(FLAG),
                },
            },
        },
    }


def _tensors(signature: Signature | None) -> list[Schema]:
    """One image, of which the number of pixels is known, or several."""
    if signature is None:
        return [_tensor(of_length(4, {"type": "integer", "minimum": 1}), {"type": "array"})]
    channels, height, width = signature.input_shape
    nested = of_length(channels, of_length(height, of_length(width, _PIXEL)))
    pixels = channels * height * width
    fixed = [{"const": size} for size in signature.input_shape]
    one = {"const": [1, channels, height, width]}
    found = [_tensor(one, {"anyOf": [of_length(pixels, _PIXEL), of_length(1, nested)]})]
    most = signature.max_images
    if most > 1:
        number = {"type": "integer", "minimum": 2, "maximum": most}
        shape = {"type": "array", "prefixItems": [number, *fixed], "items": False, "minItems": 4}
        limits = {"minItems": 2 * pixels, "maxItems": most * pixels}
        several = [list_of(_PIXEL, **limits), list_of(nested, minItems=2, maxItems=most)]
        found.append(_tensor(shape, {"anyOf": several}))
    return found


def _tensor(shape: Schema, data: Schema) -> Schema:
    return {
        "type": "object",
        "required": ["name", "datatype", "shape", "data"],
        "properties": {
            "name": {"const": INPUT_NAME},
            "datatype": {"const": DATATYPE},
            "shape": {**shape, "description": "[N, C, H, W]"},
            "data": {**data, "description": "Row-major, flat or nested as the shape says."},
            "parameters": {
                "type": ["object", "null"],
                "properties": {
                    "binary_data_size": {"type": "null"},
                    "shared_memory_region": {"type": "null"},
                },
            },
        },
    }


def infer_answer(name: str) -> Schema:
    def tensor(datatype: str, data: Schema) -> Schema:
        fields = {
            "name": {"const": OUTPUT_NAME},
            "datatype": {"const": datatype},
            "shape": of_length(2, {"type": "integer", "minimum": 1}),
        }
        size = exactly({"binary_data_size": COUNT})  # where raw bytes follow
        return {
            "oneOf": [exactly({**fields, "data": data}), exactly({**fields, "parameters": size})]
        }

    words = list_of({**STRING, "description": "score:index:label"})
    return exactly(
        {
            "model_name": {"const": name},
            "model_version": STRING,
            "outputs": of_length(
                1, {"oneOf": [tensor("FP32", list_of({"type": "number"})), tensor("BYTES", words)]}
            ),
        },
        id=STRING,
    )


def classification(name: str) -> Schema:
    label = exactly({"label": STRING, "probability": SHARE})
    return exactly(
        {
            "model_name": {"const": name},
            "model_version": STRING,
            "predictions": list_of({**label, "description": "Best first."}, minItems=1),
        }
    )
