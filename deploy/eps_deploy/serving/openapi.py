"""The interface as OpenAPI 3.1, for tools that make clients or tests of it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from eps_deploy.serving import schemas
from eps_deploy.serving.contract import Signature
from eps_deploy.serving.forms import Schema, exactly, refer
from eps_deploy.serving.model import VERSION
from eps_deploy.serving.protocol import JSON_LENGTH

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
            "schemas": schemas.named(name, signature),
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
