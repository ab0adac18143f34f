"""The types that a network's layers compute in: in its ONNX file, in ONNX Runtime, in float16.

This module does not import torch.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from eps_deploy.engines.base import INPUT_NAME, Images
from eps_deploy.engines.ort import Provider, open_session

# Operators that multiply by weights: ONNX's, and ONNX Runtime's fused variants.
LAYERS = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul"}
    | {"QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "NhwcFusedConv"}
    | {"NhwcConv", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
)
_LONE_NORM = "_bn_nchwc"  # how ONNX Runtime names the convolution that it makes of a batch norm
_NAMES: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64"}


def layer_types(model: onnx.ModelProto, *, as_executed: bool = False) -> dict[str, str]:
    """Type that each convolution, `Gemm` and `MatMul` computes in (`float16`), by node name.

    A layer whose operands are dequantised integers counts as `int8`, since an engine may compute
    it in int8; with `as_executed` it counts as the type that they were dequantised to.
    """
    known = _value_types(onnx.shape_inference.infer_shapes(model))
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


def executed_types(
    model: bytes, *, provider: Provider = "cpu", exact_qdq: bool = False, name: str = "model.onnx"
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


def _value_types(model: onnx.ModelProto) -> dict[str, int]:
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
    kinds = {known.get(name, _made(makers.get(name))) for name in operands}
    kinds.discard(TensorProto.UNDEFINED)
    if kinds and kinds <= {TensorProto.INT8, TensorProto.UINT8}:
        return "int8"  # ONNX Runtime shifts activations by 128 where its kernels want that
    names = {_NAMES.get(kind) or TensorProto.DataType.Name(kind).lower() for kind in kinds}
    return " and ".join(sorted(names)) or "unknown"


def _made(maker: onnx.NodeProto | None) -> int:
    """Output type of a node that type inference does not know."""
    if maker is None or maker.op_type != "Cast":
        return TensorProto.UNDEFINED
    return int(helper.get_node_attr_value(maker, "to"))


# -- Float16 arithmetic on runtimes that compute float16 in float32
#
# ONNX Runtime's CPU provider runs float16 nodes in float32 and drops the rounding between them, so
# that values overflow at 65504 on a GPU and not on the CPU. `round_to_float16` writes the same
# network with float32 nodes and that rounding behind each of them: products are summed in float32,
# as on tensor cores, and every result is a float16 number or infinite.

FLOAT16_MAX = float(np.finfo(np.float16).max)  # 65504


@dataclass(frozen=True, slots=True)
class Peak:
    """Largest magnitude among all float16 values of a network, and the node that computes it."""

    value: float
    node: str


def round_to_float16(model: bytes) -> bytes:
    """Rewrite the ONNX `model` in float32 with each float16 result rounded to float16.

    Inputs, outputs, and values in float32 or int8 stay the same.
    """
    proto, halves = _to_float32(model)
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in halves:
                wide, half = f"{name}.wide", f"{name}.half"
                node.output[index] = wide
                nodes += [
                    helper.make_node("Cast", [wide], [half], name=half, to=TensorProto.FLOAT16),
                    helper.make_node("Cast", [half], [name], name=wide, to=TensorProto.FLOAT),
                ]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return bytes(proto.SerializeToString(deterministic=True))


def float16_peak(model: bytes, images: Images, batch: int) -> Peak:
    """Measure the largest magnitude in the float16 part of `model`, computed in float32.

    The images are uint8 `[N, C, H, W]`, `batch` of them in a pass.
    """
    proto, halves = _to_float32(model)
    graph = proto.graph
    makers = {name: node.name for node in graph.node for name in node.output}
    names = [name for name in makers if name in halves]
    for name in names:
        size, largest = f"{name}.abs", f"{name}.peak"
        graph.node.append(helper.make_node("Abs", [name], [size]))
        graph.node.append(helper.make_node("ReduceMax", [size], [largest], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
    session = open_session(
        proto.SerializeToString(), provider="cpu", threads=1, exact_qdq=True, name="headroom"
    )
    outputs = [f"{name}.peak" for name in names]
    passes = [
        session.run(outputs, {INPUT_NAME: images[at : at + batch]})
        for at in range(0, len(images), batch)
    ]
    peaks = np.nan_to_num(np.array(passes, np.float32), nan=np.inf).max(axis=0)  # [value]
    index = int(peaks.argmax())
    return Peak(float(peaks[index]), makers[names[index]])


def _to_float32(model: bytes) -> tuple[onnx.ModelProto, set[str]]:
    """`model` with float32 in place of float16, and the names of the values that were float16."""
    proto = onnx.load_from_string(model)
    types = _value_types(onnx.shape_inference.infer_shapes(proto))
    constants = list(proto.graph.initializer)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                constants.append(attribute.t)
            elif attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    for tensor in constants:
        if tensor.data_type == TensorProto.FLOAT16:
            value = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    del proto.graph.value_info[:]
    return proto, {name for name, kind in types.items() if kind == TensorProto.FLOAT16}
