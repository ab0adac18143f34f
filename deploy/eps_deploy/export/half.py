"""Emulate float16 arithmetic on runtimes that compute float16 in float32.

ONNX Runtime's CPU provider runs float16 nodes in float32 and drops the rounding between them, so
that values overflow at 65504 on a GPU and not on the CPU. `rounded` writes the same network with
float32 nodes and that rounding behind each of them: products are summed in float32, as on tensor
cores, and every result is a float16 number or infinite.

Does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from eps_deploy.engines.base import INPUT_NAME, Images
from eps_deploy.engines.ort import open_session
from eps_deploy.export.types import value_types

LARGEST = float(np.finfo(np.float16).max)  # 65504


@dataclass(frozen=True, slots=True)
class Peak:
    """Largest magnitude among all float16 values of a network, and the node that computes it."""

    value: float
    node: str


def rounded(model: bytes) -> bytes:
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


def peak(model: bytes, images: Images, batch: int) -> Peak:
    """Measure the largest magnitude in the float16 part of `model`, computed in float32.

    Args:
        model: ONNX network with float16 values.
        images: images to measure on, uint8 `[N, C, H, W]`.
        batch: images in a pass.
    """
    proto, halves = _to_float32(model)
    makers = {name: node.name for node in proto.graph.node for name in node.output}
    names = [name for name in makers if name in halves]
    for name in names:
        proto.graph.node.extend(
            [
                helper.make_node("Abs", [name], [f"{name}.abs"]),
                helper.make_node("ReduceMax", [f"{name}.abs"], [f"{name}.peak"], keepdims=0),
            ]
        )
        proto.graph.output.append(
            helper.make_tensor_value_info(f"{name}.peak", TensorProto.FLOAT, [])
        )
    session = open_session(
        proto.SerializeToString(), provider="cpu", threads=1, exact_qdq=True, name="headroom"
    )
    outputs = [f"{name}.peak" for name in names]
    passes = [
        session.run(outputs, {INPUT_NAME: images[at : at + batch]})
        for at in range(0, len(images), batch)
    ]
    peaks = np.nan_to_num(np.array(passes, np.float32), nan=np.inf).max(axis=0)  # [value]
    largest = int(peaks.argmax())
    return Peak(float(peaks[largest]), makers[names[largest]])


def _to_float32(model: bytes) -> tuple[onnx.ModelProto, set[str]]:
    """`model` with float32 in place of float16, and the names of the values that were float16."""
    proto = onnx.load_from_string(model)
    types = value_types(onnx.shape_inference.infer_shapes(proto))
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
