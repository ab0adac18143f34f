"""Export a trained network to one ONNX file that takes raw pixels, the source of every engine."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, fx, nn

from eps_compact.exporting import quiet
from eps_core.errors import GraphError
from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Images, Logits
from eps_deploy.export import writer
from eps_deploy.export.types import layer_types
from eps_deploy.export.writer import BATCH, cast_network
from eps_deploy.precision import PRECISIONS, Precision, check_layer_types
from eps_train.data.dataset import DataIdentity
from eps_train.gating import folding
from eps_train.models.resnets import FromPixels

# The precision of a file before quantization, by the type of its weights.
_FLOATS: dict[str, Precision] = {
    choice.float: choice for choice in (PRECISIONS["fp32"], PRECISIONS["fp16"], PRECISIONS["bf16"])
}


class Deployed(FromPixels):
    """A network of type `dtype` behind its normalization: the reference for every engine.

    The normalization and the logits are in float32 whatever `dtype` is.
    """

    def __init__(
        self, network: nn.Module, identity: DataIdentity, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(network, identity)
        self.identity = identity
        self._dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        if self._dtype is torch.float32:
            return super().forward(images)
        logits: Tensor = self.network(self.normalize(images).to(self._dtype))
        return logits.float()

    @torch.inference_mode()
    def infer(self, images: Images) -> Logits:
        """Compute logits in torch; like `Engine.infer`."""
        device = next(self.normalize.buffers()).device
        logits: Logits = self(torch.from_numpy(images).to(device)).float().cpu().numpy()
        return logits


def in_precision(network: nn.Module, identity: DataIdentity, precision: Precision) -> Deployed:
    """Return `network` in torch with the float type of `precision`, as a copy unless it is float32.

    This is the only way to compute bfloat16 where no runtime supports it. Raises GraphError if a
    number does not fit in the type.
    """
    dtype = _dtype(precision)
    if dtype is torch.float32:
        return Deployed(network, identity)
    return Deployed(cast_network(network, dtype), identity, dtype)


def export_onnx(
    model: nn.Module,
    identity: DataIdentity,
    path: Path,
    *,
    precision: Precision = PRECISIONS["fp32"],
    source: str = "",
    kept: Collection[str] = (),
) -> None:
    """Export `model` behind its normalization to `path`, checked, with the weights inside.

    The graph takes `images` uint8 `[N, C, H, W]`, N dynamic, and gives `logits` float32
    `[N, classes]`. The normalization is in float32, everything from there to the logits in the
    float type of `precision`, also if it is a quantized one (see `quantize`). The same network
    gives the same bytes.

    Args:
        model: float32 network of normalized images, exported in evaluation mode whatever its mode.
        identity: data that it was trained on: image shape, mean, std, classes.
        source: digest of the file that the network came from, stored in the ONNX metadata.
        kept: names of blocks that stay in float32 for the sake of accuracy.

    Raises:
        GraphError: torch cannot express the network in ONNX, a number does not fit in the type, or
            ONNX's checker rejects the result.
    """
    was_training = model.training
    model.eval()
    try:
        _check_classes(model, identity)
        proto = None
        if isinstance(model, fx.GraphModule):
            folded, _ = folding.fold(model)
            proto = writer.write(folded, identity, _dtype(precision), _opset(precision), kept)
        if proto is None:
            proto = _trace(model, identity, precision, kept)
        resolve_ceil_mode(proto)
        version = package_version("eps-resnet")
        proto.producer_name, proto.producer_version = "eps-resnet", version
        props = {
            "eps_resnet.version": version,
            "eps_resnet.source_sha256": source,
            "eps_resnet.precision": _FLOATS[precision.float].name,
            "eps_resnet.kept": ",".join(sorted(kept)),
        }
        helper.set_model_props(proto, props)
        _check_graph(proto, identity)
        check_layer_types(layer_types(proto), _FLOATS[precision.float], kept)
    except GraphError as error:
        raise GraphError(f"{path.name}: {error}") from error
    except ModuleNotFoundError:
        raise
    except Exception as error:  # torch, onnxscript and onnx raise dozens of unrelated types
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise GraphError(f"{path.name}: the network cannot be exported to ONNX: {cause}") from error
    finally:
        model.train(was_training)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _dtype(precision: Precision) -> torch.dtype:
    found: torch.dtype = getattr(torch, precision.float)
    return found


def _opset(precision: Precision) -> int:
    """The oldest sufficient opset, so that as many runtimes as possible read the file."""
    if precision.float == "bfloat16":
        return 22  # the first with bfloat16 convolutions
    if precision.float == "float16" and precision.quantized:
        return 19  # the first with float16 scales of quantization
    return 18  # the lowest that torch's exporter writes


@torch.inference_mode()
def _check_classes(model: nn.Module, identity: DataIdentity) -> None:
    logits = Deployed(model, identity).infer(np.zeros((1, *identity.input_shape), np.uint8))
    if logits.shape != (1, len(identity.classes)):
        raise GraphError(
            f"the network gives logits of shape {list(logits.shape)} for an image, where the data"
            f" set {identity.name} has {len(identity.classes)} classes"
        )


def _trace(
    model: nn.Module, identity: DataIdentity, precision: Precision, kept: Collection[str]
) -> onnx.ModelProto:
    """Export with torch's own exporter, which takes almost every network."""
    if kept:
        raise GraphError(
            f"{min(kept)} cannot be kept in float32: the network has operators that torch's own"
            " exporter writes, as a whole in one type; use --fp32"
        )
    # Two images, because torch.export treats a size of 1 as a constant.
    example = torch.zeros((2, *identity.input_shape), dtype=torch.uint8)
    with quiet():
        program = torch.onnx.export(
            in_precision(model, identity, precision),
            (example,),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: torch.export.Dim(BATCH, min=1)},),
            opset_version=_opset(precision),
            dynamo=True,
            external_data=False,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    graph = proto.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    # The exporter's notes hold stack traces with paths of this machine.
    for item in (graph, *graph.node, *values):
        del item.metadata_props[:]
        item.doc_string = ""
    graph.name = "eps_resnet"
    # Names must not depend on the counters of one torch version.
    for index, node in enumerate(graph.node):
        node.name = f"{index:04d}_{node.op_type}"
    return proto


def _check_graph(proto: onnx.ModelProto, identity: DataIdentity) -> None:
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(
        proto, check_type=True, strict_mode=True, data_prop=True
    )
    shapes = [
        [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim]
        for port in (*inferred.graph.input, *inferred.graph.output)
    ]
    expected = [[BATCH, *identity.input_shape], [BATCH, len(identity.classes)]]
    if shapes != expected:
        raise GraphError(f"the exported network has the shapes {shapes}, not {expected}")


# -- Pools with `ceil_mode`, which runtimes compute in different ways
#
# If the last window of an `AveragePool` reaches beyond the edge, they differ in the divisor (ONNX's
# own evaluator for most kernels), even more with `count_include_pad`. Such an image is padded and
# pooled without `ceil_mode`, and its edge is then multiplied so that the divisor is torch's. If no
# window reaches beyond the edge, `ceil_mode` has no effect and is removed, because some evaluators
# add windows all the same.


def resolve_ceil_mode(model: onnx.ModelProto) -> None:
    """Rewrite the pools of `model` that have `ceil_mode`, in place, to compute what torch computes.

    Raises GraphError for an average pool that is dilated or whose image size is not fixed.
    """
    if not any(_attributes(node).get("ceil_mode") for node in model.graph.node):
        return
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {
        value.name: value.type.tensor_type for value in (*inferred.input, *inferred.value_info)
    }
    for node in list(model.graph.node):
        values = _attributes(node)
        average = node.op_type == "AveragePool"
        if not values.get("ceil_mode") or not (average or node.op_type == "MaxPool"):
            continue
        source = types.get(node.input[0])
        size = [dim.dim_value for dim in source.shape.dim] if source else []
        if len(size) != 4 or not all(size[2:]) or any(n != 1 for n in values.get("dilations", ())):
            if not average:
                continue
            raise GraphError(
                f"{node.name}: an average pool with ceil_mode whose image size is not fixed, or"
                " with dilation; give it ceil_mode=False"
            )
        strides, pads = values.get("strides", [1, 1]), values.get("pads", [0] * 4)
        kernel = values["kernel_shape"]
        axes = [_Axis(size[2 + i], kernel[i], strides[i], pads[i], pads[2 + i]) for i in range(2)]
        if all(axis.overhang <= 0 for axis in axes):
            _set(node, ceil_mode=0)
        elif average:
            assert source is not None
            padding = bool(values.get("count_include_pad"))
            _pad_and_scale(model.graph, node, axes, source.elem_type, padding)


@dataclass(frozen=True, slots=True)
class _Axis:
    """One spatial axis of a pool."""

    size: int
    kernel: int
    stride: int
    before: int
    after: int

    @property
    def windows(self) -> int:
        """As torch counts them: without a window that begins in the padding behind the image."""
        padded = self.size + self.before + self.after
        count = -(-(padded - self.kernel) // self.stride) + 1
        return count - ((count - 1) * self.stride >= self.size + self.before)

    @property
    def overhang(self) -> int:
        """How far the last window reaches beyond image and padding; at most 0 if it does not."""
        reach = (self.windows - 1) * self.stride + self.kernel
        return reach - (self.size + self.before + self.after)

    def counted(self, *, padding: bool) -> npt.NDArray[np.int64]:
        """Torch's divisor of each window, int64 `[windows]`."""
        starts = np.arange(self.windows) * self.stride - self.before
        ends = np.minimum(starts + self.kernel, self.size + (self.after if padding else 0))
        counted: npt.NDArray[np.int64] = ends - (starts if padding else np.maximum(starts, 0))
        return counted


def _pad_and_scale(
    graph: onnx.GraphProto, node: onnx.NodeProto, axes: list[_Axis], dtype: int, padding: bool
) -> None:
    """Pad before an average pool and scale behind it; `padding`: torch counts the padding."""
    source, result, name = node.input[0], node.output[0], node.name
    before = [axis.before for axis in axes]
    after = [axis.after + max(axis.overhang, 0) for axis in axes]
    rows, columns = (axis.kernel / axis.counted(padding=padding) for axis in axes)
    factor = np.outer(rows, columns)[None, None]
    pads = numpy_helper.from_array(np.array([0, 0, *before, 0, 0, *after]), f"{name}.pads")
    edge = numpy_helper.from_array(factor.astype(np.float32), f"{name}.edge")
    if dtype != onnx.TensorProto.FLOAT:
        edge = helper.make_tensor(edge.name, dtype, factor.shape, factor.ravel().tolist())
    graph.initializer.extend([pads, edge])
    place = list(graph.node).index(node)
    node.input[0], node.output[0] = f"{name}.padded", f"{name}.pooled"
    _set(node, ceil_mode=0, count_include_pad=0, pads=[0, 0, 0, 0])
    pad = helper.make_node("Pad", [source, pads.name], [f"{name}.padded"], name=f"{name}.pad")
    graph.node.insert(place, pad)
    scale = helper.make_node("Mul", [f"{name}.pooled", edge.name], [result], name=f"{name}.scale")
    graph.node.insert(place + 2, scale)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _set(node: onnx.NodeProto, **wanted: object) -> None:
    kept = [item for item in node.attribute if item.name not in wanted]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(*item) for item in wanted.items())])
