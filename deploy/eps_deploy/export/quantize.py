"""Quantize to int8 with explicit QuantizeLinear/DequantizeLinear nodes, calibrated on images.

Signed and symmetric, with zero points of 0: TensorRT's parser rejects other zero points and int32
biases. Quantized are the operands of convolutions and linear layers, weights for each channel.
Biases, the results of additions and everything before the first convolution stay in the model's
float type. For TensorRT, the shortcut that is added to a convolution's result is quantized too:
without that, an engine keeps the sum in both types and cannot fuse the addition into the
convolution (NVIDIA's advice in the TensorRT documentation, "Q/DQ placement").
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper

from eps_core.errors import DataError, GraphError
from eps_deploy.engines.base import INPUT_NAME, Images
from eps_deploy.engines.ort import open_session
from eps_deploy.export.types import LAYERS, layer_types
from eps_deploy.precision import Precision, belongs, check_layer_types
from eps_train.data.dataset import Data

Method = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[Method, ...] = ("minmax", "entropy", "percentile")
# Measured on a network of 11 blocks (Fashion-MNIST) and one of 18 (digits), three random sets each,
# by "minmax": the root mean square error was up to 6.7 times that of 512 images with 16 of them,
# 2.9 times with 32, 1.5 times with 100.
MIN_SAMPLES = 100
_SEED = 0
_BATCH = 4  # images in a pass: the activations of all layers are in memory
_BINS = 2048
_LEVELS = 128  # magnitudes 0..127
_HIGHEST = 127  # -128 is not used: symmetric
_STRIDE = 16  # bins between the candidates of the entropy method
_PERCENTILE = 99.99

Array = npt.NDArray[np.floating]
Counts = npt.NDArray[np.float64]

# -- Calibration images


def pick(data: Data, samples: int) -> Images:
    """Choose distinct images of the training part, preprocessed as for evaluation.

    Returns raw pixels, uint8 `[samples, C, H, W]`; all images if there are fewer than `samples`.
    Raises DataError for too few.
    """
    check_count(samples, f"--calibration-samples {samples}")
    part = data.train
    check_count(len(part), f"data set {data.identity.name}: {len(part)} training images")
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(_SEED))
    images: Images = part[order[:samples].sort().values].images.numpy()
    return images


def digest(images: Images) -> str:
    """SHA-256 of shape and pixels."""
    hashed = hashlib.sha256(repr(images.shape).encode())
    hashed.update(np.ascontiguousarray(images).data)
    return hashed.hexdigest()


def check_count(count: int, what: str) -> None:
    """Raise DataError for too few calibration images; `what` begins the line."""
    if count < MIN_SAMPLES:
        raise DataError(
            f"{what}: too few to calibrate int8, whose ranges would be random; at least"
            f" {MIN_SAMPLES} are needed"
        )


# -- Ranges of activations. Quantization is symmetric, so the range of a value is one number: the
#    magnitude that becomes 127.


def ranges(
    model: onnx.ModelProto, values: Iterable[str], images: Images, method: Method
) -> dict[str, float]:
    """Measure the range of each of the `values` of `model`, by their names.

    - `minmax`: the largest magnitude;
    - `percentile`: the magnitude that 99.99 % of the values do not exceed;
    - `entropy`: the cut whose quantized distribution is nearest to the real one by the
      Kullback-Leibler divergence, as in TensorRT's calibration (Migacz, GTC 2017).

    Values that are computed from the pixels without any layer always get their largest magnitude:
    pixels have no outliers, and white is as likely as grey.

    Raises:
        DataError: a value is not finite on one of the images.
    """
    names = sorted(set(values))
    largest = dict.fromkeys(names, 0.0)
    for name, magnitudes in _activations(model, names, images):
        largest[name] = max(largest[name], float(magnitudes.max(initial=0.0)))
    if broken := [name for name, value in largest.items() if not np.isfinite(value)]:
        raise DataError(
            f"calibration: {broken[0]} is not finite on the calibration images;"
            " use --bf16 or --fp32"
        )
    if method == "minmax":
        return largest
    choose = {"entropy": _by_entropy, "percentile": _by_percentile}[method]
    pixels = _before_layers(model)
    counts = {name: np.zeros(_BINS) for name in names if largest[name] > 0 and name not in pixels}
    if counts:
        for name, magnitudes in _activations(model, list(counts), images):
            bins = (magnitudes.ravel() * (_BINS / largest[name])).astype(np.int64)
            np.minimum(bins, _BINS - 1, out=bins)
            counts[name] += np.bincount(bins, minlength=_BINS)
    return largest | {name: largest[name] * choose(counts[name]) / _BINS for name in counts}


def _activations(
    model: onnx.ModelProto, names: Sequence[str], images: Images
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Name and magnitudes of each value, batch by batch."""
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    known = {port.name for port in observed.graph.output}
    added = [onnx.ValueInfoProto(name=name) for name in names if name not in known]
    observed.graph.output.extend(added)
    content = observed.SerializeToString()
    session = open_session(content, provider="cpu", threads=1, name="calibration")
    for start in range(0, len(images), _BATCH):
        values = session.run(names, {INPUT_NAME: images[start : start + _BATCH]})
        for name, value in zip(names, values, strict=True):
            yield name, np.abs(value.astype(np.float32))


def _before_layers(model: onnx.ModelProto) -> set[str]:
    """Names of the values that are computed without any layer."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found = {INPUT_NAME}
    for node in model.graph.node:
        if node.op_type not in LAYERS and found.issuperset(set(node.input) - constants):
            found.update(node.output)
    return found


def _by_percentile(counts: Counts) -> int:
    """Number of bins up to the percentile."""
    share = np.cumsum(counts) / counts.sum()
    return int(np.searchsorted(share, _PERCENTILE / 100)) + 1


def _by_entropy(counts: Counts) -> int:
    """Number of bins up to the cut of least divergence."""
    # Zeros are exact in any scale, and behind a ReLU they would outweigh everything else.
    counts = counts.copy()
    counts[0] = counts[1]
    candidates = range(_LEVELS, _BINS + 1, _STRIDE)
    return min(candidates, key=lambda cut: _divergence(counts, cut))


def _divergence(counts: Counts, cut: int) -> float:
    """Kullback-Leibler divergence of the distribution from its form quantized up to `cut`."""
    real = counts[:cut].copy()
    real[-1] += counts[cut:].sum()  # values beyond are clipped to the end
    level = np.arange(cut) * _LEVELS // cut
    present = counts[:cut] > 0
    mass = np.bincount(level, weights=counts[:cut], minlength=_LEVELS)
    spread = np.bincount(level, weights=present, minlength=_LEVELS)
    quantized = np.where(present, (mass / np.maximum(spread, 1))[level], 0.0)
    p, q = real / real.sum(), quantized / max(quantized.sum(), 1.0)
    if (q[p > 0] == 0).any():
        return float("inf")
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


# -- Rewriting the graph


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
    """Quantize the layers of an ONNX `model` from `export_onnx` to int8.

    The same arguments give the same bytes. The metadata contain the parameters of the calibration.

    Args:
        model: ONNX file in float32 (for `int8`) or in float16 at opset 19 or above (for
            `int8-fp16`).
        images: calibration images, uint8 `[N, C, H, W]`; see :func:`pick`.
        method: see :func:`ranges`.
        kept: names of the torch modules of blocks that are not quantized.

    Raises:
        DataError: too few images, or a layer gives a number that is not finite on them.
        GraphError: there is nothing to quantize.
    """
    check_count(len(images), f"{len(images)} calibration images")
    proto = onnx.load_from_string(model)
    layers = [layer for layer in _layers(proto) if not belongs(layer.node.name, kept)]
    if not layers:
        raise GraphError("--int8: no convolution or linear layer to quantize; use --fp16")
    # ONNX Runtime, which runs the float32 kind, has int8 convolutions only between rounded values.
    # TensorRT gives a convolution's result in float16, which is more exact.
    served = precision.float == "float32"
    outputs = _outputs(proto, layers) if served else {}
    shortcuts = {} if served else _shortcuts(proto, layers)
    operands = [layer.node.input[0] for layer in layers] + list(shortcuts.values())
    rounded = {name: name for name in operands} | outputs
    measured = ranges(proto, rounded.values(), images, method)
    scales = {name: measured[source] for name, source in rounded.items()}
    _insert_rounding(proto.graph, layers, scales, outputs, shortcuts)
    props = {entry.key: entry.value for entry in proto.metadata_props}
    props |= {
        "eps_resnet.precision": precision.name,
        "eps_resnet.calibration_method": method,
        "eps_resnet.calibration_samples": str(len(images)),
        "eps_resnet.calibration_sha256": digest(images),
        "eps_resnet.kept": ",".join(sorted(kept)),
    }
    helper.set_model_props(proto, props)
    onnx.checker.check_model(proto, full_check=True)
    check_layer_types(layer_types(proto), precision)
    return bytes(proto.SerializeToString(deterministic=True))


def _layers(model: onnx.ModelProto) -> Iterator[_Layer]:
    """The layers with constant weights."""
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
    """The outputs of convolutions, each with the value whose range it gets.

    An output that only a ReLU reads gets the range of the ReLU's: then the rounding behind the
    ReLU, where the next layer has its input rounded, changes nothing more.
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


def _shortcuts(model: onnx.ModelProto, layers: Sequence[_Layer]) -> dict[str, str]:
    """The shortcut of each residual addition, by the name of the addition.

    An addition is residual if it adds something to the result of one of `layers`. If it adds two of
    them, the shortcut is the one with fewer layers before it.
    """
    depth: dict[str, int] = {}  # layers on the longest path to a value
    ends = {layer.node.output[0] for layer in layers}
    found = {}
    for node in model.graph.node:
        below = [depth.get(name, 0) for name in node.input]
        for output in node.output:
            depth[output] = max(below, default=0) + (output in ends)
        if node.op_type == "Add" and depth.keys() >= set(node.input):
            one, other = sorted(node.input, key=lambda name: (name in ends, depth[name]))
            if other in ends and one != other:
                found[node.name] = one
    return found


def _insert_rounding(
    graph: onnx.GraphProto,
    layers: Sequence[_Layer],
    scales: Mapping[str, float],
    outputs: Collection[str],
    shortcuts: Mapping[str, str],
) -> None:
    """Round the inputs and weights of `layers`, the values `outputs` for all their readers, and
    those of `shortcuts` for the additions that they name.
    """
    dtype = helper.tensor_dtype_to_np_dtype(layers[0].weight.data_type)
    by_name = {layer.node.name: layer for layer in layers}
    rounded: dict[str, str] = {}  # name of the rounded form by the name of the value
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        layer = by_name.get(node.name)
        for index, name in enumerate(node.input):
            weight = layer is not None and index == 1
            operand = layer is not None and index == 0
            added = shortcuts.get(node.name) == name
            if not (weight or operand or added or name in outputs):
                continue
            if name not in rounded:
                if layer is not None and weight:
                    nodes.append(_dequantized_weight(graph, layer, dtype))
                else:
                    nodes += _round_trip(graph, name, _scale(np.asarray(scales[name]), dtype))
                rounded[name] = nodes[-1].output[0]
            node.input[index] = rounded[name]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    left = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)


def _round_trip(graph: onnx.GraphProto, source: str, scale: Array) -> list[onnx.NodeProto]:
    """Quantize and dequantize the value `source`."""
    step, zero, small, back = (f"{source}.{kind}" for kind in ("scale", "zero", "int8", "rounded"))
    _add_constants(graph, {step: scale, zero: np.zeros((), np.int8)})
    return [
        helper.make_node("QuantizeLinear", [source, step, zero], [small], name=f"{source}.q"),
        helper.make_node("DequantizeLinear", [small, step, zero], [back], name=f"{source}.dq"),
    ]


def _dequantized_weight(
    graph: onnx.GraphProto, layer: _Layer, dtype: npt.DTypeLike
) -> onnx.NodeProto:
    """Store the layer's weight as int8 and dequantize it."""
    name = layer.weight.name
    values = numpy_helper.to_array(layer.weight).astype(np.float32)
    others = tuple(index for index in range(values.ndim) if index != layer.axis)
    scale = _scale(np.abs(values).max(axis=others), dtype)
    shape = [-1 if index == layer.axis else 1 for index in range(values.ndim)]
    levels = np.rint(values / scale.astype(np.float32).reshape(shape))
    constants = {
        f"{name}.int8": np.clip(levels, -_HIGHEST, _HIGHEST).astype(np.int8),
        f"{name}.scale": scale,
        f"{name}.zero": np.zeros(len(scale), np.int8),
    }
    _add_constants(graph, constants)
    inputs, outputs = list(constants), [f"{name}.rounded"]
    return helper.make_node("DequantizeLinear", inputs, outputs, name=f"{name}.dq", axis=layer.axis)


def _add_constants(graph: onnx.GraphProto, constants: Mapping[str, npt.NDArray[Any]]) -> None:
    graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in constants.items()
    )


def _scale(largest: Array, dtype: npt.DTypeLike) -> Array:
    """Value of one level, above 0 even for values that are all 0."""
    smallest = np.finfo(dtype).tiny  # the smallest that no engine flushes to zero
    scale: Array = np.maximum(largest.astype(np.float32) / _HIGHEST, smallest).astype(dtype)
    return scale
