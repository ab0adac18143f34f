"""int8 by explicit quantise/dequantise nodes, calibrated on training images.

Signed, symmetric, zero points 0: what TensorRT's parser takes (it refuses zero points and int32
biases). Quantised are the operands of convolutions and linear layers, weights channel by channel;
biases, additions and whatever precedes the first convolution stay in the model's float type:
rounding piles up along a residual stream (ONNX Runtime's own quantisation, which rounds additions
too, left a network of 11 blocks 25 % of its accuracy). An engine that sees a layer between
dequantise nodes may compute it in int8.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from eps_deploy.engines.base import Images
from eps_deploy.exporting import calibration
from eps_deploy.exporting.calibration import Method
from eps_deploy.exporting.onnx_types import belongs, check_types
from eps_deploy.precision import Precision
from eps_train.errors import GraphError

_HIGHEST = 127  # -128 is left out: symmetric

Array = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class _Layer:
    node: onnx.NodeProto
    weight: onnx.TensorProto
    axis: int  # of the weight's output channels


def quantize(
    model: bytes,
    images: Images,
    precision: Precision,
    *,
    method: Method = "minmax",
    kept: Collection[str] = (),
) -> bytes:
    """The ONNX `model`, as `export_onnx` wrote it for `precision`, with its layers in int8.

    The same arguments give the same bytes. Its metadata say how it was calibrated.

    Args:
        model: in float32 (for `int8`) or float16 at opset 19 or above (for `int8-fp16`).
        images: uint8 `[N, C, H, W]`, of the training part: see `calibration.pick`.
        precision: a quantised one.
        method: how a range is read off the images: see `calibration.ranges`.
        kept: blocks that are left as they are, by the names of their torch modules.

    Raises:
        DataError: too few images, or a layer that gives no finite numbers on them.
        GraphError: there is nothing to quantise.
    """
    calibration.check_enough(images)
    proto = onnx.load_from_string(model)
    layers = [layer for layer in _layers(proto) if not belongs(layer.node.name, kept)]
    if not layers:
        raise GraphError("--int8: no convolution or linear layer to quantise; use --fp16")
    # ONNX Runtime, which runs the float32 kind, has int8 convolutions only between rounded values.
    # TensorRT gives a convolution's result in float16, which is more exact.
    outputs = _outputs(proto, layers) if precision.float == "float32" else {}
    rounded = {layer.node.input[0]: layer.node.input[0] for layer in layers} | outputs
    reach = calibration.ranges(proto, rounded.values(), images, method)
    scales = {name: reach[source] for name, source in rounded.items()}
    _rewrite(proto, layers, scales, outputs)
    _describe(proto, images, precision, method, kept)
    onnx.checker.check_model(proto, full_check=True)
    check_types(proto, precision)
    return bytes(proto.SerializeToString(deterministic=True))


def _layers(model: onnx.ModelProto) -> Iterable[_Layer]:
    """What multiplies constant weights."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        weight = weights.get(node.input[1]) if len(node.input) > 1 else None
        if weight is None:
            continue
        if node.op_type == "Conv":
            yield _Layer(node, weight, 0)
        elif node.op_type == "Gemm":
            transposed = any(item.name == "transB" and item.i for item in node.attribute)
            yield _Layer(node, weight, 0 if transposed else 1)
        elif node.op_type == "MatMul" and len(weight.dims) == 2:
            yield _Layer(node, weight, 1)


def _outputs(model: onnx.ModelProto, layers: Sequence[_Layer]) -> dict[str, str]:
    """The convolutions' outputs, each with the value whose range it gets.

    An output that a ReLU alone reads gets that one's: then the rounding behind the ReLU, where the
    next layer has its input rounded, changes nothing more.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = {}
    for layer in layers:
        output = layer.node.output[0]
        if layer.node.op_type == "Conv" and output in readers:
            rectified = [node.op_type for node in readers[output]] == ["Relu"]
            found[output] = readers[output][0].output[0] if rectified else output
    return found


def _rewrite(
    model: onnx.ModelProto,
    layers: Sequence[_Layer],
    scales: Mapping[str, float],
    outputs: Collection[str],
) -> None:
    """Round the layers' inputs and weights, and for all that read them the values `outputs`."""
    graph = model.graph
    dtype = helper.tensor_dtype_to_np_dtype(layers[0].weight.data_type)
    wanted = {layer.node.name: layer for layer in layers}
    rounded: dict[str, str] = {}  # by what it is a rounded form of
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        layer = wanted.get(node.name)
        for index, name in enumerate(node.input):
            if layer is not None and index == 1:
                if name not in rounded:
                    rounded[name] = _weight(graph, nodes, layer, dtype)
            elif name in outputs or (layer is not None and index == 0):
                if name not in rounded:
                    scale = _scale(np.asarray(scales[name]), dtype)
                    rounded[name] = _round_trip(graph, nodes, name, scale)
            else:
                continue
            node.input[index] = rounded[name]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    left = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)


def _round_trip(
    graph: onnx.GraphProto, steps: list[onnx.NodeProto], source: str, scale: Array
) -> str:
    """Quantise and dequantise the value `source`; returns the name of the result."""
    step, zero, small, back = (f"{source}.{kind}" for kind in ("scale", "zero", "int8", "rounded"))
    graph.initializer.append(numpy_helper.from_array(scale, step))
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int8), zero))
    steps += [
        helper.make_node("QuantizeLinear", [source, step, zero], [small], name=f"{source}.q"),
        helper.make_node("DequantizeLinear", [small, step, zero], [back], name=f"{source}.dq"),
    ]
    return back


def _weight(
    graph: onnx.GraphProto, steps: list[onnx.NodeProto], layer: _Layer, dtype: npt.DTypeLike
) -> str:
    """Store the layer's weight as int8 and dequantise it; returns the name of the result."""
    name = layer.weight.name
    values = numpy_helper.to_array(layer.weight).astype(np.float32)
    others = tuple(index for index in range(values.ndim) if index != layer.axis)
    scale = _scale(np.abs(values).max(axis=others), dtype)
    shape = [-1 if index == layer.axis else 1 for index in range(values.ndim)]
    levels = np.rint(values / scale.astype(np.float32).reshape(shape))
    small = np.clip(levels, -_HIGHEST, _HIGHEST).astype(np.int8)
    graph.initializer.append(numpy_helper.from_array(small, f"{name}.int8"))
    graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
    graph.initializer.append(numpy_helper.from_array(np.zeros(len(scale), np.int8), f"{name}.zero"))
    steps.append(
        helper.make_node(
            "DequantizeLinear",
            [f"{name}.int8", f"{name}.scale", f"{name}.zero"],
            [f"{name}.rounded"],
            name=f"{name}.dq",
            axis=layer.axis,
        )
    )
    return f"{name}.rounded"


def _scale(reach: npt.NDArray[np.floating], dtype: npt.DTypeLike) -> Array:
    """What one level stands for. Values that are all 0 take any scale but 0."""
    smallest = np.finfo(dtype).tiny  # the smallest that no engine flushes to zero
    scale: Array = np.maximum(reach.astype(np.float32) / _HIGHEST, smallest).astype(dtype)
    return scale


def _describe(
    model: onnx.ModelProto,
    images: Images,
    precision: Precision,
    method: Method,
    kept: Collection[str],
) -> None:
    props = {entry.key: entry.value for entry in model.metadata_props}
    props |= {
        "eps_resnet.precision": precision.name,
        "eps_resnet.calibration_method": method,
        "eps_resnet.calibration_samples": str(len(images)),
        "eps_resnet.calibration_sha256": calibration.digest(images),
        "eps_resnet.kept": ",".join(sorted(kept)),
    }
    del model.metadata_props[:]
    helper.set_model_props(model, props)
