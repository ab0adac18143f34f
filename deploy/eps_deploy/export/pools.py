"""Pools that every runtime reads alike.

Where `ceil_mode` lets the last window of an `AveragePool` hang over the edge, runtimes differ in
what they divide by (ONNX's own evaluator in most kernels), the more with `count_include_pad`. Such
an image is padded and pooled without `ceil_mode`, and then its edge is multiplied so that it is
divided by what torch divides it by. Where no window hangs over, `ceil_mode` says nothing, and
evaluators that add windows all the same are not misled by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from eps_core.errors import GraphError


def unambiguous(model: onnx.ModelProto) -> None:
    """Rewrite the pools of `model` that have `ceil_mode`, in place; they give what torch gives.

    Raises GraphError for an average pool that cannot be rewritten: its image size is not known, or
    it is dilated.
    """
    while (found := _next(model)) is not None:
        _rewrite(model, *found)


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
        """As torch counts them: one that begins in the padding behind the image is left out."""
        padded = self.size + self.before + self.after
        count = -(-(padded - self.kernel) // self.stride) + 1
        return count - ((count - 1) * self.stride >= self.size + self.before)

    @property
    def overhang(self) -> int:
        """How far the last window reaches beyond image and padding; at most 0: it does not."""
        reach = (self.windows - 1) * self.stride + self.kernel
        return reach - (self.size + self.before + self.after)

    def counted(self, *, padding: bool) -> npt.NDArray[np.int64]:
        """Numbers that torch divides each window's sum by, `[windows]`."""
        starts = np.arange(self.windows) * self.stride - self.before
        ends = np.minimum(starts + self.kernel, self.size + (self.after if padding else 0))
        counted: npt.NDArray[np.int64] = ends - (starts if padding else np.maximum(starts, 0))
        return counted


def _next(model: onnx.ModelProto) -> tuple[onnx.NodeProto, tuple[_Axis, _Axis], bool] | None:
    """The first average pool that hangs over, its axes, and whether it counts its padding.

    Pools that do not hang over lose their `ceil_mode`.
    """
    pools = [
        (node, values)
        for node in model.graph.node
        if node.op_type in ("AveragePool", "MaxPool")
        and (values := {item.name: helper.get_attribute_value(item) for item in node.attribute})
        and values.get("ceil_mode")
    ]
    if not pools:
        return None
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.value_info)
    }
    for node, values in pools:
        size = shapes.get(node.input[0], [])
        average = node.op_type == "AveragePool"
        if len(size) != 4 or not all(size[2:]) or any(n != 1 for n in values.get("dilations", ())):
            if not average:
                continue
            raise GraphError(
                f"{node.name}: an average pool with ceil_mode whose image size is not fixed, or"
                " with dilation; give it ceil_mode=False"
            )
        strides, pads = values.get("strides", [1, 1]), values.get("pads", [0] * 4)
        kernel = values["kernel_shape"]
        rows, columns = (
            _Axis(size[2 + i], kernel[i], strides[i], pads[i], pads[2 + i]) for i in range(2)
        )
        hangs_over = rows.overhang > 0 or columns.overhang > 0
        if hangs_over and average:
            return node, (rows, columns), bool(values.get("count_include_pad"))
        if not hangs_over:
            _set(node, ceil_mode=0)
    return None


def _rewrite(
    model: onnx.ModelProto, node: onnx.NodeProto, axes: tuple[_Axis, _Axis], padding: bool
) -> None:
    source, result, name = node.input[0], node.output[0], node.name
    dtype = _dtype(model, source)
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
    model.graph.initializer.extend([pads, edge])
    place = list(model.graph.node).index(node)
    node.input[0], node.output[0] = f"{name}.padded", f"{name}.pooled"
    _set(node, ceil_mode=0, count_include_pad=0, pads=[0, 0, 0, 0])
    pad = helper.make_node("Pad", [source, pads.name], [f"{name}.padded"], name=f"{name}.pad")
    model.graph.node.insert(place, pad)
    scale = helper.make_node("Mul", [f"{name}.pooled", edge.name], [result], name=f"{name}.scale")
    model.graph.node.insert(place + 2, scale)


def _dtype(model: onnx.ModelProto, value: str) -> int:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    ports = (*inferred.input, *inferred.value_info)
    return next(int(port.type.tensor_type.elem_type) for port in ports if port.name == value)


def _set(node: onnx.NodeProto, **wanted: object) -> None:
    kept = [item for item in node.attribute if item.name not in wanted]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(*item) for item in wanted.items())])
