"""Request and response formats of each server: the smallest one that it supports."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

import numpy as np
from _servers import Post

from eps_deploy.engines.base import Images, Logits

JSON_LENGTH = "Inference-Header-Content-Length"
_RAW = "application/octet-stream"
_JSON = "application/json"


def v2_binary(model: str, images: Images) -> Post:
    """KServe v2 with the pixels as raw bytes after the JSON, as NVIDIA's client sends them."""
    head = {
        "inputs": [
            {
                "name": "images",
                "shape": list(images.shape),
                "datatype": "UINT8",
                "parameters": {"binary_data_size": images.nbytes},
            }
        ],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    return Post(
        path=f"/v2/models/{model}/infer",
        headers={"Content-Type": _RAW, JSON_LENGTH: str(len(text))},
        body=text + images.tobytes(),
    )


def from_v2_binary(answer: bytes, headers: Mapping[str, str]) -> Logits:
    return np.frombuffer(answer[int(headers[JSON_LENGTH]) :], dtype="<f4")


def v2_base64(model: str, images: Images) -> Post:
    """KServe v2 in JSON, the pixels as a string."""
    tensor = {
        "name": "images",
        "shape": [len(images), 1],
        "datatype": "BYTES",
        "parameters": {"content_type": "base64"},
        "data": _strings(images),
    }
    return _json(f"/v2/models/{model}/infer", {"inputs": [tensor]})


def from_v2_json(answer: bytes, headers: Mapping[str, str]) -> Logits:
    return np.array(json.loads(answer)["outputs"][0]["data"], dtype=np.float32)


def raw(path: str, images: Images) -> Post:
    """Raw pixels."""
    return Post(path=path, headers={"Content-Type": _RAW}, body=images.tobytes())


def from_raw(answer: bytes, headers: Mapping[str, str]) -> Logits:
    return np.frombuffer(answer, dtype="<f4")


def _strings(images: Images) -> list[str]:
    return [base64.b64encode(image.tobytes()).decode() for image in images]


def _json(path: str, value: object) -> Post:
    return Post(path=path, headers={"Content-Type": _JSON}, body=json.dumps(value).encode())
