"""Hooks for schemathesis (SCHEMATHESIS_HOOKS): what OpenAPI cannot express."""

from __future__ import annotations

import io
from typing import Any

import schemathesis
from hypothesis import strategies as st
from PIL import Image

PIXELS = 64  # of an image of the network here
HEADER = "Inference-Header-Content-Length"


def image(kind: str, side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "white").save(file, kind)
    return file.getvalue()


def whole(value: Any) -> Any:
    """JSON Schema calls 7.0 an integer; this server, like Triton, wants it written as 7."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [whole(item) for item in value]
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return value


def agreed(body: Any) -> Any:
    """As many pixels as the shape says, and time enough for an answer."""
    tensor = body["inputs"][0]
    if isinstance(tensor["data"][0], list):
        tensor["shape"][0] = len(tensor["data"])
    else:
        tensor["shape"][0] = len(tensor["data"]) // PIXELS
        del tensor["data"][tensor["shape"][0] * PIXELS :]
    if body.get("parameters"):
        body["parameters"].pop("timeout", None)
    return body


for kind in ("jpeg", "png", "webp"):
    images = st.sampled_from([image(kind, side) for side in (1, 8, 100)])
    schemathesis.openapi.media_type(f"image/{kind}", images)
# One image, which the header's 0 announces.
schemathesis.openapi.media_type(
    "application/octet-stream", st.binary(min_size=PIXELS, max_size=PIXELS)
)


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Make right requests right where their parts depend on each other."""
    if not case.path.endswith("/infer") or not case.meta.generation.mode.is_positive:
        return
    if case.media_type == "application/octet-stream":
        case.headers[HEADER] = "0"
    else:
        case.headers.pop(HEADER, None)
        case.body = agreed(whole(case.body))
