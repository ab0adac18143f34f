"""The arithmetic a deployed network runs in. Plain data: servers read it from the manifest.

Precision is in the ONNX file, because TensorRT 11 builds strongly typed networks alone; the same
file gives the same arithmetic on TensorRT 10. Images go in as uint8 and logits come out as float32
in every precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Float = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Precision:
    """One choice of `--fp32 | --tf32 | --fp16 | --bf16 | --int8 [--fp16]`.

    Attributes:
        name: as manifest and report have it: `fp32`, `tf32`, `fp16`, `bf16`, `int8`, `int8-fp16`.
        float: type of the weights and of whatever is not quantised.
        quantized: whether convolutions and linear layers take int8.
        tf32: whether an NVIDIA GPU may round float32 products to TF32.
    """

    name: str
    float: Float = "float32"
    quantized: bool = False
    tf32: bool = False


PRECISIONS = {
    choice.name: choice
    for choice in (
        Precision("fp32"),
        Precision("tf32", tf32=True),
        Precision("fp16", "float16"),
        Precision("bf16", "bfloat16"),
        Precision("int8", quantized=True),
        Precision("int8-fp16", "float16", quantized=True),
    )
}
