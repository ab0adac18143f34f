"""The interface as OpenAPI 3.1, for tools that make clients or tests of it."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME
from eps_deploy.serving.contract import DATATYPE
from eps_deploy.serving.protocol import JSON_LENGTH
from eps_deploy.triton import NAME

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
    "additionalProperties": False,
}
_TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"const": INPUT_NAME},
        "datatype": {"const": DATATYPE},
        "shape": {
            "type": "array",
            "items": {"type": "integer", "minimum": 1},
            "minItems": 4,
            "maxItems": 4,
        },
        "data": {"type": "array"},
        "parameters": {
            "type": "object",
            "properties": {"binary_data_size": {"type": "integer", "minimum": 0}},
        },
    },
}
_OUTPUT = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"const": OUTPUT_NAME},
        "parameters": {
            "type": "object",
            "properties": {
                "binary_data": {"type": "boolean"},
                "classification": {"type": "integer", "minimum": 0},
            },
        },
    },
}
_INFER = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string", "maxLength": 256},
        "inputs": {"type": "array", "items": _TENSOR, "minItems": 1, "maxItems": 1},
        "outputs": {"type": "array", "items": _OUTPUT, "maxItems": 1},
        "parameters": {
            "type": "object",
            "properties": {
                "timeout": {"type": "integer", "minimum": 0, "description": "microseconds"},
                "binary_data_output": {"type": "boolean"},
            },
        },
    },
}
_JSON = {"application/json": {"schema": {"type": "object"}}}
_LOAD = {"type": "object", "properties": {"parameters": {"type": "object", "maxProperties": 0}}}


def _json(schema: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    return {"required": required, "content": {"application/json": {"schema": schema}}}


def _path(
    method: str, summary: str, *, parameters: tuple[dict[str, Any], ...] = (), **more: Any
) -> dict[str, Any]:
    operation = {
        "summary": summary,
        "responses": {
            "200": {"description": "the answer", **more.pop("answer", {"content": _JSON})},
            "default": {
                "description": "why there is none",
                "content": {"application/json": {"schema": _ERROR}},
            },
        },
        **more,
    }
    if parameters:
        operation["parameters"] = list(parameters)
    return {method: operation}


@cache
def document() -> dict[str, Any]:
    length = {"name": JSON_LENGTH, "in": "header", "schema": {"type": "integer", "minimum": 0}}
    top = {"name": "top", "in": "query", "schema": {"type": "integer", "minimum": 1}}
    picture = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}
    pictures = dict.fromkeys(("image/jpeg", "image/png", "image/webp"), picture)
    text = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    model = f"/v2/models/{NAME}"
    return {
        "openapi": "3.1.0",
        "info": {"title": "eps-serve", "version": version("eps-resnet")},
        "paths": {
            "/v2/health/live": _path("get", "Whether the process is of any use"),
            "/v2/health/ready": _path("get", "Whether requests are answered"),
            "/v2": _path("get", "Server metadata"),
            model: _path("get", "Model metadata"),
            f"{model}/ready": _path("get", "Whether the model is ready"),
            f"{model}/config": _path("get", "Triton's model configuration"),
            f"{model}/stats": _path("get", "Triton's statistics"),
            f"{model}/infer": _path(
                "post", "Logits of images", parameters=(length,), requestBody=_json(_INFER)
            ),
            "/v2/models/stats": _path("get", "Statistics of all models, which is one"),
            "/v2/repository/index": _path(
                "post", "The models", requestBody=_json({"type": "object"}, required=False)
            ),
            f"/v2/repository/models/{NAME}/load": _path(
                "post", "Read the bundle again", requestBody=_json(_LOAD, required=False)
            ),
            "/v1/classify": _path(
                "post",
                "Labels of a picture",
                parameters=(top,),
                requestBody={"required": True, "content": pictures},
            ),
            "/v1/card": _path("get", "What the network is"),
            "/v1/figures": _path("get", "Live figures"),
            "/metrics": _path("get", "Prometheus metrics", answer=text),
        },
    }
