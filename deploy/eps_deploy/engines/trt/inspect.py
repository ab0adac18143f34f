"""What an engine really computes in: the inspector's JSON, read and counted.

A strongly typed network fixes the types of its tensors; which kernels TensorRT then took, the
inspector alone can tell. TensorRT 10 writes type and layout in one field, 11 in two.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from eps_deploy.engines.base import EngineError

# In this order: "UInt8" holds "int8", and "BFloat16" holds "float16".
_KINDS = (
    (re.compile(r"u?int64|\bi64"), "int64"),
    (re.compile(r"u?int32|\bi32"), "int32"),
    (re.compile(r"uint8"), "uint8"),
    (re.compile(r"int8"), "int8"),
    (re.compile(r"int4"), "int4"),
    (re.compile(r"fp8|float8"), "fp8"),
    (re.compile(r"fp4|float4"), "fp4"),
    (re.compile(r"bf16|bfloat16?"), "bf16"),
    (re.compile(r"fp16|half|float16"), "fp16"),
    (re.compile(r"fp32|float"), "fp32"),
    (re.compile(r"bool"), "bool"),
)
_PRODUCTS = re.compile(r"conv|gemm|matmul|matrix|correlation", re.IGNORECASE)
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of an engine, by the type that they compute in.

    Attributes:
        all: number of layers of each type: `{"fp16": 30, "fp32": 2}`; `other` where it is not told.
        products: the same for those that multiply matrices: convolutions and linear layers.
        by_name: name and type of each of these.
    """

    all: dict[str, int]
    products: dict[str, int]
    by_name: dict[str, str]


def information_of(engine: Any, trt: Any) -> str:
    """The inspector's JSON on an `ICudaEngine`. Raises EngineError when it gives none."""
    inspector = engine.create_engine_inspector()
    if inspector is None:
        raise EngineError("TensorRT gives no inspector for this engine")
    text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return text


def summarize(information: str) -> Layers:
    """Count the layers in the inspector's JSON, as TensorRT 10 or 11 writes it.

    A layer computes in the type of its weights, or of its first input when it has none.

    Raises:
        EngineError: not the inspector's JSON.
    """
    try:
        # TensorRT has put control characters into names.
        layers = json.loads(information, strict=False)["Layers"]
        kinds = [(_name(layer), _is_product(layer), _kind_of(layer)) for layer in layers]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise EngineError(
            f"TensorRT's inspector gave no usable JSON ({type(error).__name__}: {error})"
        ) from error
    return Layers(
        all=dict(Counter(kind for _, _, kind in kinds)),
        products=dict(Counter(kind for _, product, kind in kinds if product)),
        by_name={name: kind for name, product, kind in kinds if product},
    )


def kind_of(text: str) -> str:
    """The type in `Half`, `FP16`, `Row major linear INT8 format` and the like; else `other`."""
    lowered = text.lower()
    return next((kind for pattern, kind in _KINDS if pattern.search(lowered)), OTHER)


def _name(layer: Any) -> str:
    return str(layer if isinstance(layer, str) else layer["Name"])  # names alone: no details built


def _is_product(layer: Any) -> bool:
    if isinstance(layer, str):
        return bool(_PRODUCTS.search(layer))
    # Fused layers have names of all their parts, and a type of their own ("kgen", "fusion").
    words = (layer.get("LayerType", ""), layer.get("ParameterType", ""), layer.get("TacticName"))
    if "reformat" in str(words[0]).lower():
        return False
    return any(_PRODUCTS.search(str(word)) for word in words)


def _kind_of(layer: Any) -> str:
    if isinstance(layer, str):
        return OTHER
    weights = layer.get("Weights")
    if isinstance(weights, dict) and weights.get("Type"):
        return kind_of(str(weights["Type"]))
    inputs = layer.get("Inputs") or layer.get("Outputs") or []
    return kind_of(_type_of(inputs[0])) if inputs else OTHER


def _type_of(tensor: dict[str, Any]) -> str:
    for key in ("Datatype", "DataType", "Format/Datatype"):
        if key in tensor:
            return str(tensor[key])
    return str(tensor.get("Format", ""))
