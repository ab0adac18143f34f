"""The types that a network's layers compute in: in its ONNX file, and in ONNX Runtime.

This module does not import torch.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import onnx
from onnx import TensorProto

from eps_deploy.engines.ort import Provider, open_session
from eps_deploy.precision import Precision, check_layer_types
from eps_deploy.precision import belongs as belongs

# Operators that multiply by weights: ONNX's, and ONNX Runtime's fused variants.
LAYERS = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul"}
    | {"QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "NhwcFusedConv"}
    | {"NhwcConv", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
)
_LONE_NORM = "_bn_nchwc"  # how ONNX Runtime names the convolution that it makes of a batch norm
_UNKNOWN = "unknown"
_WORDS: dict[int, str] = {
    TensorProto.UNDEFINED: _UNKNOWN,
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
}


def layer_types(model: onnx.ModelProto, *, as_executed: bool = False) -> dict[str, str]:
    """Type that each convolution, `Gemm` and `MatMul` computes in (`float16`), by node name.

    A layer whose operands are dequantised integers counts as `int8`, since an engine may compute
    it in int8; with `as_executed` it counts as the type that they were dequantised to.
    """
    known = value_types(onnx.shape_inference.infer_shapes(model))
    makers = {output: node for node in model.graph.node for output in node.output}
    if not as_executed:
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear":
                known[node.output[0]] = known.get(node.input[0], _made(makers.get(node.input[0])))
    return {
        node.name: _layer_type(node, makers, known)
        for node in model.graph.node
        if node.op_type in LAYERS and not node.name.endswith(_LONE_NORM)
    }


def check_types(model: onnx.ModelProto, precision: Precision, kept: Collection[str] = ()) -> None:
    """Apply :func:`eps_deploy.precision.check_layer_types` to an ONNX network."""
    check_layer_types(layer_types(model), precision, kept)


def executed_types(
    model: bytes,
    *,
    provider: Provider = "cpu",
    exact_qdq: bool = False,
    name: str = "model.onnx",
) -> dict[str, int]:
    """Number of layers that ONNX Runtime computes in each type on this machine.

    Read from its optimised graph: a processor without float16 arithmetic, for example, computes
    float32 layers with casts around them. Raises EngineError as `OrtEngine` does.
    """
    with tempfile.TemporaryDirectory(prefix="eps-deploy-") as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(
            model, provider=provider, threads=1, exact_qdq=exact_qdq, name=name, optimized=path
        )
        optimized = onnx.load(path)
    types = layer_types(optimized, as_executed=True)
    return dict(sorted(Counter(types.values()).items()))


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX's type number of each value, constants included, by name; 0 when unknown."""
    graph = model.graph
    known = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        known[value.name] = value.type.tensor_type.elem_type
    return known


def _layer_type(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], known: Mapping[str, int]
) -> str:
    # Shape inference does not know ONNX Runtime's own operators, but their weights are constants.
    weights = 3 if node.op_type in ("QLinearConv", "QLinearMatMul", "QGemm") else 1
    operands = [node.input[index] for index in (0, weights) if index < len(node.input)]
    kinds = {_name(known.get(name, _made(makers.get(name)))) for name in operands}
    kinds.discard(_UNKNOWN)
    if kinds <= {"int8", "uint8"} and kinds:
        return "int8"  # ONNX Runtime shifts activations by 128 where its kernels want that
    return " and ".join(sorted(kinds)) or _UNKNOWN


def _made(maker: onnx.NodeProto | None) -> int:
    """Output type of a node that type inference does not know."""
    if maker is None or maker.op_type != "Cast":
        return TensorProto.UNDEFINED
    return next(int(item.i) for item in maker.attribute if item.name == "to")


def _name(kind: int) -> str:
    if kind in _WORDS:
        return _WORDS[kind]
    name: str = TensorProto.DataType.Name(kind)
    return name.lower()
