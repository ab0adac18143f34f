"""int8 by explicit quantise/dequantise nodes, calibrated on training images.

Signed, symmetric, zero points 0: what TensorRT's parser takes (it refuses zero points and int32
biases). Quantised are the operands of convolutions and linear layers, weights channel by channel;
biases, additions and whatever precedes the first convolution stay in the model's float type:
rounding piles up along a residual stream (ONNX Runtime's own quantisation, which rounds additions
too, left a network of 11 blocks 25 % of its accuracy). An engine that sees a layer between
dequantise nodes may compute it in int8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper

from eps_core.errors import DataError, GraphError
from eps_deploy.engines.base import INPUT_NAME, Images
from eps_deploy.engines.ort import open_session
from eps_deploy.export.types import LAYERS, belongs, check_types
from eps_deploy.precision import Precision
from eps_train.data.dataset import Data

# -- How far the activations of a network reach, measured on real images, for int8 to cover it
#
# Quantisation is symmetric, so a tensor's range is one number: the magnitude that becomes 127.

Method = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[Method, ...] = ("minmax", "entropy", "percentile")
# Measured on a network of 11 blocks (Fashion-MNIST) and one of 18 (digits), three draws each, by
# "minmax": the root mean square error was up to 6.7 times that of 512 images with 16 of them, 2.9
# times with 32, 1.5 times with 100.
MIN_SAMPLES = 100
_SEED = 0
_BATCH = 4  # images in flight: the activations of all layers lie in memory
_BINS = 2048
_LEVELS = 128  # magnitudes 0..127
_STRIDE = 16  # bins between the candidates of the entropy method
_PERCENTILE = 99.99

Magnitudes = npt.NDArray[np.float32]
Counts = npt.NDArray[np.float64]


def pick(data: Data, samples: int) -> Images:
    """Images of the training part, without repetition, as evaluation preprocesses them.

    Args:
        data: the data set.
        samples: how many; all there are, if there are fewer.

    Returns:
        Raw pixels uint8 `[samples, C, H, W]`, which an exported network takes as they are.

    Raises:
        DataError: too few images.
    """
    _enough(samples, f"--calibration-samples {samples}")
    part = data.train
    _enough(len(part), f"data set {data.identity.name}: {len(part)} training images")
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(_SEED))
    images: Images = part[order[:samples].sort().values].images.numpy()
    return images


def check_enough(images: Images) -> None:
    """Raise DataError if `images` are too few to read ranges off them."""
    _enough(len(images), f"{len(images)} calibration images")


def digest(images: Images) -> str:
    """SHA-256 of shape and pixels."""
    hashed = hashlib.sha256(repr(images.shape).encode())
    hashed.update(np.ascontiguousarray(images).data)
    return hashed.hexdigest()


def ranges(
    model: onnx.ModelProto, values: Iterable[str], images: Images, method: Method
) -> dict[str, float]:
    """The magnitude that int8 must reach, for each of the `values` of `model`, by their names.

    - `minmax`: the largest that occurs;
    - `percentile`: what 99.99 % of the values stay within;
    - `entropy`: the cut whose quantised distribution is nearest to the real one, by the
      Kullback-Leibler divergence, as TensorRT's calibration had it (Migacz, GTC 2017).

    What is computed from the pixels without any layer is always covered whole: pixels have no
    outliers, and white is as likely as grey.

    Raises DataError when a value is not finite on one of the images.
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
    cut = [name for name in names if largest[name] > 0 and name not in _pixels(model)]
    counts = {name: np.zeros(_BINS) for name in cut}
    if cut:
        for name, magnitudes in _activations(model, cut, images):
            bins = (magnitudes.ravel() * (_BINS / largest[name])).astype(np.int64)
            np.minimum(bins, _BINS - 1, out=bins)
            counts[name] += np.bincount(bins, minlength=_BINS)
    return largest | {name: largest[name] * choose(counts[name]) / _BINS for name in cut}


def _enough(count: int, what: str) -> None:
    if count < MIN_SAMPLES:
        raise DataError(
            f"{what}: too few for int8, whose ranges would be those of chance; at least"
            f" {MIN_SAMPLES} are needed"
        )


def _activations(
    model: onnx.ModelProto, names: Sequence[str], images: Images
) -> Iterator[tuple[str, Magnitudes]]:
    """Name and magnitudes of each value, batch by batch."""
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    known = {port.name for port in observed.graph.output}
    observed.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in names if name not in known
    )
    session = open_session(
        observed.SerializeToString(), provider="cpu", threads=1, name="calibration"
    )
    for start in range(0, len(images), _BATCH):
        values = session.run(names, {INPUT_NAME: images[start : start + _BATCH]})
        for name, value in zip(names, values, strict=True):
            yield name, np.abs(value.astype(np.float32))


def _pixels(model: onnx.ModelProto) -> set[str]:
    """Values that no weights have touched yet."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found = {INPUT_NAME}
    for node in model.graph.node:
        if node.op_type not in LAYERS and found.issuperset(set(node.input) - constants):
            found.update(node.output)
    return found


def _by_percentile(counts: Counts) -> int:
    """How many bins hold the percentile."""
    share = np.cumsum(counts) / max(counts.sum(), 1.0)
    return int(np.searchsorted(share, _PERCENTILE / 100)) + 1


def _by_entropy(counts: Counts) -> int:
    """After how many bins to cut."""
    if not counts.any():
        return _BINS
    # Zeros are exact in any scale: the pile of them behind a ReLU would outweigh all else.
    counts = counts.copy()
    counts[0] = counts[1]
    candidates = range(_LEVELS, _BINS + 1, _STRIDE)
    return min(candidates, key=lambda cut: _divergence(counts, cut))


def _divergence(counts: Counts, cut: int) -> float:
    """Kullback-Leibler divergence of the distribution from its form quantised up to `cut`."""
    real = counts[:cut].copy()
    real[-1] += counts[cut:].sum()  # what lies beyond is clipped to the end
    level = np.arange(cut) * _LEVELS // cut
    present = counts[:cut] > 0
    mass = np.bincount(level, weights=counts[:cut], minlength=_LEVELS)
    spread = np.bincount(level, weights=present, minlength=_LEVELS)
    quantized = np.where(present, (mass / np.maximum(spread, 1))[level], 0.0)
    p, q = real / real.sum(), quantized / max(quantized.sum(), 1.0)
    if (q[p > 0] == 0).any():
        return float("inf")
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


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
    check_enough(images)
    proto = onnx.load_from_string(model)
    layers = [layer for layer in _layers(proto) if not belongs(layer.node.name, kept)]
    if not layers:
        raise GraphError("--int8: no convolution or linear layer to quantise; use --fp16")
    # ONNX Runtime, which runs the float32 kind, has int8 convolutions only between rounded values.
    # TensorRT gives a convolution's result in float16, which is more exact.
    outputs = _outputs(proto, layers) if precision.float == "float32" else {}
    rounded = {layer.node.input[0]: layer.node.input[0] for layer in layers} | outputs
    reach = ranges(proto, rounded.values(), images, method)
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
        "eps_resnet.calibration_sha256": digest(images),
        "eps_resnet.kept": ",".join(sorted(kept)),
    }
    del model.metadata_props[:]
    helper.set_model_props(model, props)
