"""The interface as OpenAPI 3.1, for tools that make clients or tests of it."""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import version
from typing import Any

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME
from eps_deploy.report.schema import json_schema
from eps_deploy.serving.model import VERSION
from eps_deploy.serving.protocol import DATATYPE, JSON_LENGTH, Signature

# -- Small pieces of JSON Schema 2020-12

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number", "minimum": 0}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}


def refer(name: str) -> Schema:
    """To one of the schemas that OpenAPI names."""
    return {"$ref": f"#/components/schemas/{name}"}


def exactly(required: dict[str, Schema], **optional: Schema) -> Schema:
    """An object with these keys and no others."""
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


def list_of(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def of_length(count: int, items: Schema) -> Schema:
    return list_of(items, minItems=count, maxItems=count)


def or_null(schema: Schema) -> Schema:
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


# -- JSON Schema of what is asked of the network, and of what it answers

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


# -- JSON Schema of all requests and answers, by the names that OpenAPI gives them

_SIZES: Schema = {"type": "array", "items": {"type": "integer", "minimum": -1}}
# As they stand in the bundle's report.
_REPORTED = (
    "accuracy",
    "flops",
    "latency",
    "latency_baseline",
    "lossless",
    "parameters",
    "passed",
)


def named(name: str, signature: Signature | None) -> dict[str, Schema]:
    """All of them; without a signature, before there is a model, images are of any shape."""
    return {
        "Error": exactly({"error": {**STRING, "description": "One line for whoever asked."}}),
        "InferRequest": infer_request(signature),
        "InferAnswer": infer_answer(name),
        "LoadRequest": {
            "type": "object",
            "properties": {
                "parameters": {
                    "type": ["object", "null"],
                    "additionalProperties": {"type": "null"},
                }
            },
        },
        "IndexRequest": {
            "type": "object",
            "properties": {"parameters": {"type": ["object", "null"]}},
        },
        "Classification": classification(name),
        "Server": exactly(
            {"name": STRING, "version": STRING, "extensions": list_of(STRING)},
        ),
        "Model": _schemas_model(name),
        "Config": _config(name),
        "Statistics": _statistics(name),
        "Index": list_of(
            exactly(
                {
                    "name": STRING,
                    "version": STRING,
                    "state": {"enum": ["READY", "UNAVAILABLE"]},
                    "reason": STRING,
                }
            )
        ),
        "Card": _card(name),
        "Figures": _figures(),
        **_report()["$defs"],
    }


def _schemas_model(name: str) -> Schema:
    tensor = list_of(exactly({"name": STRING, "datatype": STRING, "shape": _SIZES}), minItems=1)
    return exactly(
        {
            "name": {"const": name},
            "versions": list_of(STRING),
            "platform": {"enum": ["onnxruntime_onnx", "tensorrt_plan"]},
            "inputs": tensor,
            "outputs": tensor,
        }
    )


def _config(name: str) -> Schema:
    tensor = list_of(exactly({"name": STRING, "data_type": STRING, "dims": _SIZES}), minItems=1)
    return exactly(
        {
            "name": {"const": name},
            "platform": STRING,
            "max_batch_size": COUNT,
            "input": tensor,
            "output": tensor,
            "instance_group": list_of(
                exactly({"count": COUNT, "kind": {"enum": ["KIND_CPU", "KIND_GPU"]}})
            ),
            "parameters": {
                "type": "object",
                "additionalProperties": exactly({"string_value": STRING}),
            },
        }
    )


def _statistics(name: str) -> Schema:
    duration = exactly({"count": COUNT, "ns": COUNT})
    parts = ("compute_input", "compute_infer", "compute_output")
    whole = ("success", "fail", "queue", *parts)
    batch = exactly({"batch_size": COUNT, **dict.fromkeys(parts, duration)})
    entry = {
        "name": {"const": name},
        "version": STRING,
        "last_inference": {**COUNT, "description": "Unix time in milliseconds; 0: never."},
        "inference_count": {**COUNT, "description": "Images."},
        "execution_count": {**COUNT, "description": "Batches."},
        "inference_stats": exactly(dict.fromkeys(whole, duration)),
        "batch_stats": list_of(batch),
    }
    return exactly({"model_stats": of_length(1, exactly(entry))})


def _card(name: str) -> Schema:
    reported = _report()["properties"]
    engine = exactly(
        {"runtime": STRING, "version": STRING, "max_batch": COUNT},
        provider=STRING,
        threads=COUNT,
        device=STRING,
    )
    blocks = dict.fromkeys(("baseline", "compact"), or_null(COUNT))
    proof = {"samples": COUNT, "difference": NUMBER, "limit": NUMBER}
    return exactly(
        {
            "name": {"const": name},
            "version": STRING,
            "digest": STRING,
            "data": or_null(STRING),
            "labels": list_of(STRING, minItems=1),
            "input_shape": of_length(3, {"type": "integer", "minimum": 1}),
            "preprocessing": exactly(
                {
                    "resize": of_length(2, COUNT),
                    "crop": of_length(2, COUNT),
                    "color": STRING,
                    "interpolation": STRING,
                    "exif_rotation": FLAG,
                    "antialias": FLAG,
                }
            ),
            "precision": STRING,
            "engine": engine,
            "blocks": exactly(blocks),
            "proof": exactly(proof),
            **{key: reported[key] for key in _REPORTED},
        }
    )


def _figures() -> Schema:
    shadow = {
        "images": COUNT,
        "disagreements": COUNT,
        "disagreement": {**or_null(SHARE), "description": "Share of the images."},
        "time_ratio": {**or_null(NUMBER), "description": "Shadow over served, median."},
        "dropped_images": COUNT,
        "failed_batches": COUNT,
    }
    return exactly(
        {
            "ready": FLAG,
            "requests_per_second": {**NUMBER, "description": "Of the last ten seconds."},
            "images_per_second": {**NUMBER, "description": "Of the last ten seconds."},
            "requests": {**COUNT, "description": "Answered by the network."},
            "images": COUNT,
            "batches": COUNT,
            "mean_batch": or_null(NUMBER),
            "p50_ms": {**or_null(NUMBER), "description": "Of the last 1000 answers."},
            "p99_ms": {**or_null(NUMBER), "description": "Of the last 1000 answers."},
            "queued_images": COUNT,
            "refused": {
                "type": "object",
                "additionalProperties": COUNT,
                "description": "Requests, by reason.",
            },
            "shadow": or_null(exactly(shadow)),
        }
    )


@cache
def _report() -> dict[str, Any]:
    """The schema of `report.json`, with its references as they are in OpenAPI."""
    text = json.dumps(json_schema())
    schema: dict[str, Any] = json.loads(text.replace("#/$defs/", "#/components/schemas/"))
    return schema


_JSON = "application/json"
_BYTES = "application/octet-stream"
_PICTURES = ("image/jpeg", "image/png", "image/webp")
_MARKS = ("X-Request-ID", "traceparent")
_HEADERS: dict[str, tuple[str, Schema]] = {
    "X-Request-ID": ("The request's own, or a new one.", {"type": "string"}),
    "traceparent": ("The request's (W3C Trace Context).", {"type": "string"}),
    "Retry-After": ("Seconds.", {"type": "integer", "minimum": 1}),
    "WWW-Authenticate": ("Which token is wanted.", {"const": "Bearer"}),
    "Allow": ("The methods that there are.", {"type": "string"}),
    "Accept-Encoding": ("How a body may be packed.", {"const": "identity"}),
    JSON_LENGTH: ("Bytes of JSON before the raw tensor.", {"type": "integer", "minimum": 1}),
}
_REFUSALS: dict[str, tuple[str, tuple[str, ...]]] = {
    "400": ("Something is wrong with the request; the message says what.", ()),
    "401": ("The server wants a token.", ("WWW-Authenticate",)),
    "403": ("Loading is off.", ()),
    "404": ("No such path, model or version.", ()),
    "405": ("Another method is wanted.", ("Allow",)),
    "408": ("The request took too long to come.", ()),
    "413": ("The body is too large.", ()),
    "415": ("The body is compressed.", ("Accept-Encoding",)),
    "431": ("The headers are too large.", ()),
    "500": ("The engine failed.", ()),
    "503": ("Not now; Retry-After says when, unless a retry does not help.", ("Retry-After",)),
}
_ALWAYS = ("400", "401", "405", "408", "431", "500", "503")


def document(name: str, signature: Signature | None) -> dict[str, Any]:
    """All of it, for this model; `signature` None: it is not loaded yet."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "eps-serve",
            "version": version("eps-resnet"),
            "description": "KServe v2 (Open Inference Protocol), pictures, figures.",
        },
        # Relative to the document: also behind a proxy that serves it under a prefix.
        "servers": [{"url": "."}],
        "security": [{}, {"token": []}],
        "paths": _paths(name, signature),
        "components": {
            "schemas": named(name, signature),
            "headers": {
                name: {"description": text, "schema": schema}
                for name, (text, schema) in _HEADERS.items()
            },
            "responses": {code: _refusal(code) for code in _REFUSALS},
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Of the server's --token-file, if it has one.",
                }
            },
        },
    }


def _paths(name: str, signature: Signature | None) -> dict[str, Any]:
    paths = {
        "/": _operation("get", "The page", _text("text/html"), public=True),
        "/v1/classify": _classify(signature),
        "/v1/card": _operation("get", "What the network is", _json("Card")),
        "/v1/figures": _operation("get", "Live figures", _json("Figures")),
        "/metrics": _operation("get", "For Prometheus", _text("text/plain")),
        "/openapi.json": _operation("get", "This document", _json({"type": "object"})),
        "/v2": _operation("get", "The server", _json("Server")),
        "/v2/health/live": _probe("Whether the process is of any use", "live"),
        "/v2/health/ready": _probe("Whether requests are answered", "ready"),
        "/v2/models/stats": _operation("get", "Statistics of all models", _json("Statistics")),
        "/v2/repository/index": _operation(
            "post", "The models, which is one", _json("Index"), body=_small("IndexRequest")
        ),
        f"/v2/repository/models/{name}/load": _operation(
            "post",
            "Read the bundle again; off unless the server has --allow-load",
            _json({"const": {}}),
            body=_small("LoadRequest"),
            refusals=("403",),
        ),
    }
    versioned = _model(name, f"/v2/models/{name}/versions/{{version}}")
    model = _model(name, f"/v2/models/{name}")
    return paths | model | {path: _versioned(item) for path, item in versioned.items()}


def _model(name: str, prefix: str) -> dict[str, Any]:
    return {
        prefix: _operation("get", "The model", _json("Model")),
        f"{prefix}/ready": _probe("Whether the model is ready", "ready", name),
        f"{prefix}/config": _operation("get", "Triton's configuration", _json("Config")),
        f"{prefix}/stats": _operation("get", "Triton's statistics", _json("Statistics")),
        f"{prefix}/infer": _infer(),
    }


def _versioned(item: dict[str, Any]) -> dict[str, Any]:
    """The same path with a version in it, which may be one that is not there."""
    for operation in item.values():
        operation["responses"] |= _refer("404")
    version = {"name": "version", "in": "path", "required": True, "schema": {"const": VERSION}}
    return {"parameters": [version], **item}


def _operation(
    method: str,
    summary: str,
    answer: dict[str, Any],
    *,
    body: dict[str, Any] | None = None,
    parameters: tuple[dict[str, Any], ...] = (),
    refusals: tuple[str, ...] = (),
    public: bool = False,
) -> dict[str, Any]:
    """What a path may hold for a method; `public`: without a token too."""
    codes = {*_ALWAYS, *refusals, *(("413", "415") if body else ())}
    if public:
        codes.remove("401")
    responses = {"200": answer, **_refer(*sorted(codes))}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if public:
        operation["security"] = [{}]
    if body:
        operation["requestBody"] = body
    if parameters:
        operation["parameters"] = list(parameters)
    return {method: operation}


def _probe(summary: str, key: str, model: str | None = None) -> dict[str, Any]:
    """200 or 503, and the same body with both."""

    def told(value: bool) -> Schema:
        fields: dict[str, Schema] = {key: {"const": value}}
        if model is not None:
            fields["name"] = {"const": model}
        return exactly(fields)

    path = _operation("get", summary, _json(told(True)), public=model is None)
    content = {_JSON: {"schema": {"anyOf": [told(False), refer("Error")]}}}
    path["get"]["responses"]["503"] = _response("Not now.", content, "Retry-After")
    return path


def _classify(signature: Signature | None) -> dict[str, Any]:
    most = len(signature.labels) if signature is not None else 5
    top: Schema = {"type": "integer", "minimum": 1, "maximum": 999_999, "default": 5}
    return _operation(
        "post",
        "Labels of a picture, with probabilities",
        _json("Classification"),
        body={"required": True, "content": {kind: {} for kind in _PICTURES}},
        parameters=(
            {"name": "top", "in": "query", "schema": top, "description": f"Of {most} labels."},
        ),
    )


def _infer() -> dict[str, Any]:
    length = {
        "name": JSON_LENGTH,
        "in": "header",
        "schema": {"type": "integer", "minimum": 0},
        "description": "With raw bytes: how much JSON stands before them; 0: the body is an image.",
    }
    content = {_JSON: {"schema": refer("InferAnswer")}, _BYTES: {}}
    return _operation(
        "post",
        "Logits of images, or their labels",
        _response("JSON, or JSON and a raw tensor after it.", content, JSON_LENGTH),
        body={"required": True, "content": {_JSON: {"schema": refer("InferRequest")}, _BYTES: {}}},
        parameters=(length,),
    )


def _small(name: str) -> dict[str, Any]:
    return {"required": False, "content": {_JSON: {"schema": refer(name)}}}


def _json(schema: str | Schema) -> dict[str, Any]:
    found = refer(schema) if isinstance(schema, str) else schema
    return _response("The answer.", {_JSON: {"schema": found}})


def _text(kind: str) -> dict[str, Any]:
    return _response("The answer.", {kind: {"schema": {"type": "string"}}})


def _refer(*codes: str) -> dict[str, Any]:
    return {code: {"$ref": f"#/components/responses/{code}"} for code in codes}


def _refusal(code: str) -> dict[str, Any]:
    text, headers = _REFUSALS[code]
    return _response(text, {_JSON: {"schema": refer("Error")}}, *headers)


def _response(text: str, content: dict[str, Any], *headers: str) -> dict[str, Any]:
    names = (*_MARKS, *headers)
    return {
        "description": text,
        "content": content,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
    }
