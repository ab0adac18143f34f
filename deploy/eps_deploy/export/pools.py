"""Rewrite pools with `ceil_mode` so that every runtime computes the same.

If `ceil_mode` lets the last window of an `AveragePool` reach beyond the edge, runtimes differ in
the divisor (ONNX's own evaluator for most kernels), even more with `count_include_pad`. Such an
image is padded and pooled without `ceil_mode`, and its edge is then multiplied so that the divisor
is torch's. If no window reaches beyond the edge, `ceil_mode` has no effect and is removed, because
some evaluators add windows all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from eps_core.errors import GraphError


def resolve_ceil_mode(model: onnx.ModelProto) -> None:
    """Rewrite the pools of `model` that have `ceil_mode`, in place, to compute what torch computes.

    Raises:
        GraphError: an average pool that cannot be rewritten, because its image size is not fixed
            or it is dilated.
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
    rows, columns = (
        axis.kernel / axis.counted(padding=padding).astype(np.float64) for axis in axes
    )
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
