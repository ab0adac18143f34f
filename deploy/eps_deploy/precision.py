"""The precisions of deployed networks, and the check that a network's layers compute in one.

The precision is in the ONNX file: TensorRT 11 builds strongly typed networks only, and the same
file gives the same arithmetic on TensorRT 10. In every precision the images are uint8 and the
logits float32. This module is plain data that servers use too: it imports neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from eps_core.errors import GraphError

Float = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Precision:
    """One choice of `--fp32 | --tf32 | --fp16 | --bf16 | --int8 [--fp16]`."""

    name: str  # in manifest and report
    float: Float = "float32"  # type of the weights and of everything that is not quantised
    quantized: bool = False  # convolutions and linear layers take int8
    tf32: bool = False  # an NVIDIA GPU may round float32 products to TF32


FP32 = Precision("fp32")
PRECISIONS = {
    choice.name: choice
    for choice in (
        FP32,
        Precision("tf32", tf32=True),
        Precision("fp16", "float16"),
        Precision("bf16", "bfloat16"),
        Precision("int8", quantized=True),
        Precision("int8-fp16", "float16", quantized=True),
    )
}


def belongs(name: str, blocks: Iterable[str]) -> bool:
    """Whether the layer `name` is one of `blocks` or is inside one."""
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def check_layer_types(
    types: Mapping[str, str], precision: Precision, kept: Collection[str] = ()
) -> None:
    """Check that convolutions and linear layers compute in the type of `precision`.

    For a quantised precision that is int8, or its float type for a layer that cannot be quantised
    (a product of two activations); at least one layer must take int8. `types` is the type of each
    layer (`float16`, `int8`) by its name, `kept` are the names of blocks whose layers may compute
    in float32 too (`eps-deploy --repair`). Raises GraphError, which names the layer.
    """
    foreign = f"this ONNX file is not of precision {precision.name}"
    allowed = [precision.float, "int8"] if precision.quantized else [precision.float]
    for name, found in types.items():
        if found not in allowed and not (found == "float32" and belongs(name, kept)):
            wanted = " or ".join(allowed)
            raise GraphError(f"layer {name} computes in {found}, not in {wanted}: {foreign}")
    if precision.quantized and "int8" not in types.values():
        raise GraphError(
            f"none of the {len(types)} convolutions and linear layers takes int8: {foreign}"
        )
