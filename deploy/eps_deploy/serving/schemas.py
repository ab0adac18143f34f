"""JSON Schema of all requests and answers, by the names that OpenAPI gives them."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from eps_deploy.serving import infer_schemas
from eps_deploy.serving.contract import Signature
from eps_deploy.serving.forms import (
    COUNT,
    FLAG,
    NUMBER,
    SHARE,
    STRING,
    Schema,
    exactly,
    list_of,
    of_length,
    or_null,
)

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
        "InferRequest": infer_schemas.infer_request(signature),
        "InferAnswer": infer_schemas.infer_answer(name),
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
        "Classification": infer_schemas.classification(name),
        "Server": exactly(
            {"name": STRING, "version": STRING, "extensions": list_of(STRING)},
        ),
        "Model": _model(name),
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


def _model(name: str) -> Schema:
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
    text = files("eps_deploy").joinpath("reporting/report.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text.replace("#/$defs/", "#/components/schemas/"))
    return schema
