"""OpenAPI 3.1 document of the server: `openapi.json`, filled in for the model that is served.

In `openapi.json`, `{model}` is the model's name and a string such as `"{pixels}"` a number. The
schemas that the model card shares with a bundle's report are those of `report.json`.
"""

from __future__ import annotations

import json
import math
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from eps_deploy.report.schema import json_schema
from eps_deploy.serving.protocol import Signature

_INPUT_SCHEMAS = ("AnyImages", "OneImage", "SeveralImages")


@cache
def document(name: str, signature: Signature | None) -> dict[str, Any]:
    """Return the OpenAPI document for the model `name`.

    Args:
        name: of the model, as it is in the paths.
        signature: of the model; None before it is loaded, when images may have any shape.
    """
    text = files(__package__).joinpath("openapi.json").read_text("utf-8")
    text = text.replace("{model}", name).replace("{package_version}", version("eps-resnet"))
    accepted = ["AnyImages"]
    if signature is not None:
        channels, height, width = signature.input_shape
        pixels, most = math.prod(signature.input_shape), signature.max_images
        for placeholder, value in {
            "channels": channels,
            "height": height,
            "width": width,
            "pixels": pixels,
            "min_pixels": 2 * pixels,
            "max_pixels": most * pixels,
            "max_images": most,
        }.items():
            text = text.replace(f'"{{{placeholder}}}"', str(value))
        accepted = ["OneImage", "SeveralImages"] if most > 1 else ["OneImage"]
    filled: dict[str, Any] = json.loads(text)
    schemas = filled["components"]["schemas"]
    for unused in set(_INPUT_SCHEMAS).difference(accepted):
        del schemas[unused]
    schemas["InferRequest"]["properties"]["inputs"]["items"] = {
        "anyOf": [{"$ref": f"#/components/schemas/{schema}"} for schema in accepted]
    }
    text = json.dumps(json_schema())
    report = json.loads(text.replace("#/$defs/", "#/components/schemas/"))
    schemas |= report["$defs"]
    card = schemas["Card"]
    card["properties"] |= {
        field: report["properties"][field]
        for field in card["required"]
        if field not in card["properties"]
    }
    return filled
