"""Write the ONNX graph of a residual network from its torch.fx graph.

torch's own exporter traces the network again, decomposes and optimizes it, which takes minutes at a
depth of hundreds. These networks are made of a dozen operators that ONNX has under the same names,
so they are written directly, with the names of the torch modules, which identify an engine's
layers. A network with any other operator is left to torch's exporter.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, fx, nn

from eps_core.errors import GraphError
from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME
from eps_deploy.precision import belongs
from eps_train.data.dataset import DataIdentity
from eps_train.gating import folding, rewriting
from eps_train.gating.tracing import acts_on_others
from eps_train.models.resnets import Downsample, Normalize

BATCH = "N"
_IR = 10  # of ONNX 1.17, the oldest supported version: files require no more than they need
_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
}

# -- Casting weights to a narrower type


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast `tensor` to `dtype`, on the CPU, contiguous and detached; integers are not cast.

    Raises GraphError, with `name` in the message, when a number is not finite in `dtype`.
    """
    value = tensor.detach().cpu().contiguous()
    if not value.is_floating_point():
        return value
    result = value.to(dtype)
    if result.isfinite().all():
        return result
    if not value.isfinite().all():
        raise GraphError(
            f"{name}: holds a number that is not finite; train again from an earlier checkpoint"
        )
    raise GraphError(
        f"{name}: its largest number, {value.abs().max().item():.4g}, does not fit in"
        f" {str(dtype).removeprefix('torch.')} (at most {torch.finfo(dtype).max:.5g});"
        " use --bf16 or --fp32"
    )


def cast_network(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy `network` in evaluation mode with parameters and buffers of type `dtype`.

    Batch norms are folded first if possible, in float32, so that weights are rounded only once and
    torch's exporter leaves no float32 weight behind. Raises GraphError as :func:`cast` does.
    """
    copied = copy.deepcopy(network).eval()
    with contextlib.suppress(GraphError):  # a network that cannot be traced is not folded
        copied, _ = folding.fold(rewriting.trace(copied, one_mode=True))
    for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
        cast(name, tensor, dtype)
    return copied.to(dtype)


# -- The ONNX graph under construction


class UnsupportedOperator(Exception):
    """An operator, or a use of one, that this module does not write."""


def _require(expressible: bool) -> None:
    if not expressible:
        raise UnsupportedOperator


class OnnxGraph:
    """Nodes and constants of the graph so far, in order.

    Attributes:
        dtype: type of the current step: of its operands, constants and result.
        values: name of the result of each step of the torch.fx graph.
        flat: names of the values `[N, features]`; all others are `[N, C, H, W]`.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.dtype = torch.float32
        self.values: dict[fx.Node, str] = {}
        self.flat: set[str] = set()
        self._names: set[str] = set()
        self._types: dict[str, torch.dtype] = {}

    def unique(self, name: str) -> str:
        """`name`, with a number if a module is called more than once."""
        count, found = 1, name
        while found in self._names:
            count += 1
            found = f"{name}#{count}"
        self._names.add(found)
        return found

    def operand(self, argument: object) -> str:
        """Name of the value of a step, cast to the current type if necessary."""
        if not isinstance(argument, fx.Node):
            raise UnsupportedOperator
        name = self.values[argument]
        if self._types[name] is self.dtype:
            return name
        result = f"{name}.{str(self.dtype).removeprefix('torch.')}"
        if result not in self._types:
            self.add("Cast", result, [name], output=result, to=_TYPES[self.dtype])
        return result

    def image(self, value: str) -> str:
        """`value`, which must be `[N, C, H, W]`."""
        _require(value not in self.flat)
        return value

    def vector(self, value: str) -> str:
        """`value`, which must be `[N, features]`."""
        _require(value in self.flat)
        return value

    def constants(self, name: str, **tensors: Tensor | None) -> list[str]:
        """Add the constants `NAME.KEY` in the current type; integers are not cast."""
        names = []
        for key, value in tensors.items():
            if value is not None:
                names.append(f"{name}.{key}")
                found = cast(names[-1], value, self.dtype)
                raw = found.view(torch.int16) if found.dtype is torch.bfloat16 else found
                content = raw.numpy().tobytes()
                kind = _TYPES[found.dtype]
                tensor = helper.make_tensor(names[-1], kind, found.shape, content, raw=True)
                self.tensors.append(tensor)
        return names

    def add(
        self, kind: str, name: str, inputs: Sequence[str], *, output: str = "", **attributes: Any
    ) -> str:
        """Add a node; returns the name of its result, by default that of the node and `.out`."""
        output = output or f"{name}.out"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        self._types[output] = self.dtype
        if kind == "Flatten" or not self.flat.isdisjoint(inputs):
            self.flat.add(output)
        return output


# -- Modules. A rule takes the graph, the name of the node, the name of the operand and the module.
#    It raises `UnsupportedOperator` for a use that ONNX cannot express or that is not needed.


def _conv(out: OnnxGraph, name: str, value: str, layer: nn.Conv2d) -> str:
    _require(not isinstance(layer.padding, str) and layer.padding_mode == "zeros")
    return out.add(
        "Conv",
        name,
        [out.image(value), *out.constants(name, weight=layer.weight, bias=layer.bias)],
        kernel_shape=list(layer.kernel_size),
        strides=list(layer.stride),
        pads=[*layer.padding, *layer.padding],
        dilations=list(layer.dilation),
        group=layer.groups,
    )


def _batch_norm(out: OnnxGraph, name: str, value: str, layer: nn.BatchNorm2d) -> str:
    """One scale and one shift for each channel, computed in float64."""
    if layer.running_mean is None or layer.running_var is None:
        raise UnsupportedOperator  # it uses the statistics of the batch
    mean = layer.running_mean.double()
    scale = (layer.running_var.double() + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach().double()
    shift = -mean * scale
    if layer.bias is not None:
        shift = shift + layer.bias.detach().double()
    zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
    constants = out.constants(name, scale=scale, shift=shift, mean=zeros, variance=ones)
    return out.add("BatchNormalization", name, [out.image(value), *constants], epsilon=0.0)


def _linear(out: OnnxGraph, name: str, value: str, layer: nn.Linear) -> str:
    constants = out.constants(name, weight=layer.weight, bias=layer.bias)
    return out.add("Gemm", name, [out.vector(value), *constants], transB=1)


def _identity(out: OnnxGraph, name: str, value: str, layer: nn.Module) -> str:
    return value


def _empty(out: OnnxGraph, name: str, value: str, layer: nn.Sequential) -> str:
    _require(len(layer) == 0)
    return value


def _max_pool(out: OnnxGraph, name: str, value: str, layer: nn.MaxPool2d) -> str:
    _require(not layer.return_indices)
    window = _window(layer.kernel_size, layer.stride, layer.padding, ceil=layer.ceil_mode)
    return out.add("MaxPool", name, [out.image(value)], **window, dilations=_pair(layer.dilation))


def _avg_pool(out: OnnxGraph, name: str, value: str, layer: nn.AvgPool2d) -> str:
    window = layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode
    return _average(out, name, value, *window, layer.count_include_pad, layer.divisor_override)


def _downsample(out: OnnxGraph, name: str, value: str, layer: Downsample) -> str:
    pooled = _average(out, f"{name}.pool", value, 2, ceil_mode=True)
    return _pad(out, f"{name}.pad", pooled, layer.padding)


# -- Functions. A rule takes the graph, the name of the node, and the function's own arguments under
#    torch's names, with the names of values in place of tensors.


def _relu(out: OnnxGraph, name: str, value: str, /, inplace: bool = False) -> str:
    return out.add("Relu", name, [value])


def _add(out: OnnxGraph, name: str, value: str, other: Any, /) -> str:
    _require(isinstance(other, str) and (value in out.flat) == (other in out.flat))
    return out.add("Add", name, [value, other])


def _scale(out: OnnxGraph, name: str, value: str, /, other: Any) -> str:
    _require(isinstance(other, (int, float)))
    return out.add("Mul", name, [value, *out.constants(name, factor=torch.tensor(float(other)))])


def _average(
    out: OnnxGraph,
    name: str,
    value: str,
    /,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> str:
    _require(divisor_override is None)
    window = _window(kernel_size, stride, padding, ceil=ceil_mode)
    counted = count_include_pad and any(window["pads"])
    operand = out.image(value)
    return out.add("AveragePool", name, [operand], **window, count_include_pad=int(counted))


def _global_average(out: OnnxGraph, name: str, value: str, /, output_size: Any) -> str:
    _require(_pair(output_size) == [1, 1])
    return out.add("GlobalAveragePool", name, [out.image(value)])


def _flatten(
    out: OnnxGraph, name: str, value: str, /, start_dim: int = 0, end_dim: int = -1
) -> str:
    _require(start_dim == 1 and end_dim in (-1, 3))
    return out.add("Flatten", name, [out.image(value)], axis=1)


def _pad(
    out: OnnxGraph, name: str, operand: str, /, pad: Any, mode: str = "constant", value: Any = None
) -> str:
    sizes = list(pad)
    _require(mode == "constant" and value in (None, 0) and len(sizes) in (0, 2, 4, 6, 8))
    sizes += [0] * (8 - len(sizes))
    # torch has a pair for each dimension, the last one first; ONNX has all begins, then all ends.
    pads = torch.tensor([*sizes[-2::-2], *sizes[-1::-2]], dtype=torch.int64)
    return out.add("Pad", name, [out.image(operand), *out.constants(name, pads=pads)])


def _window(kernel: Any, stride: Any, padding: Any, *, ceil: bool) -> dict[str, Any]:
    sizes, steps, pads = _pair(kernel), _pair(stride or kernel), _pair(padding)
    # A last window that starts beyond the image counts in ONNX and not in torch.
    inside = not any(pads) and steps[0] <= sizes[0] and steps[1] <= sizes[1]
    _require(inside or not ceil)
    return {"kernel_shape": sizes, "strides": steps, "pads": [*pads, *pads], "ceil_mode": int(ceil)}


def _pair(size: Any) -> list[int]:
    pair = [size, size] if isinstance(size, int) else list(size)
    _require(len(pair) == 2 and all(isinstance(number, int) for number in pair))
    return pair


# By exact type: a subclass may compute something else.
_MODULES: dict[type[nn.Module], Callable[[OnnxGraph, str, str, Any], str]] = {
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.Linear: _linear,
    nn.ReLU: lambda out, name, value, layer: _relu(out, name, value),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: lambda out, name, value, layer: _global_average(
        out, name, value, layer.output_size
    ),
    nn.Flatten: lambda out, name, value, layer: _flatten(
        out, name, value, layer.start_dim, layer.end_dim
    ),
    Downsample: _downsample,
    nn.Identity: _identity,
    nn.Dropout: _identity,
    nn.Sequential: _empty,
}
_FUNCTIONS: dict[Any, Callable[..., str]] = {
    torch.add: _add,
    operator.add: _add,
    torch.mul: _scale,
    operator.mul: _scale,
    F.relu: _relu,
    torch.relu: _relu,
    F.avg_pool2d: _average,
    F.adaptive_avg_pool2d: _global_average,
    F.pad: _pad,
    torch.flatten: _flatten,
    torch.clone: lambda out, name, value: value,
}

# -- The whole network


def write(
    network: fx.GraphModule,
    identity: DataIdentity,
    dtype: torch.dtype,
    opset: int,
    kept: Collection[str] = (),
) -> onnx.ModelProto | None:
    """Write a float32 network without gates, in evaluation mode, behind its normalization.

    The graph takes `images` uint8 `[N, C, H, W]` and gives `logits` float32 `[N, classes]`. The
    normalization is in float32, everything from there to the logits in `dtype`, except the blocks
    or modules named in `kept` with their additions, which stay in float32.

    Returns None for an unsupported operator. Raises GraphError, which names the tensor, when a
    number is not finite in `dtype`.
    """
    out = OnnxGraph()
    modules = dict(network.named_modules(remove_duplicate=False))
    try:
        for node in network.graph.nodes:
            _require(not acts_on_others(node, modules))  # ONNX has values, not memory
            ends = node.op in ("placeholder", "output")
            out.dtype = torch.float32 if ends or _is_kept(node, kept) else dtype
            if node.op == "placeholder" and not out.values:
                out.values[node] = _normalize(out, identity)
            elif node.op == "output":
                _set_output(out, out.vector(out.operand(node.args[0])))
            else:
                out.values[node] = _step(out, node, modules)
    except UnsupportedOperator:
        return None
    images: list[str | int | None] = [BATCH, *identity.input_shape]
    logits: list[str | int | None] = [BATCH, len(identity.classes)]
    graph = helper.make_graph(
        out.nodes,
        "eps_resnet",
        [helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, images)],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, logits)],
        out.tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=_IR)


def _is_kept(node: fx.Node, kept: Collection[str]) -> bool:
    """Whether a step belongs to a kept block; a function belongs where one of its operands does."""
    if node.op != "call_module":
        operands = (source for source in node.all_input_nodes if source.op == "call_module")
        return any(_is_kept(source, kept) for source in operands)
    return belongs(str(node.target), kept)


def _normalize(out: OnnxGraph, identity: DataIdentity) -> str:
    normalize = Normalize.of(identity)
    mean, std = out.constants("normalize", mean=normalize.mean, std=normalize.std)
    pixels = out.add("Cast", out.unique("normalize.cast"), [INPUT_NAME], to=TensorProto.FLOAT)
    centred = out.add("Sub", out.unique("normalize.sub"), [pixels, mean])
    return out.add("Div", out.unique("normalize.div"), [centred, std])


def _set_output(out: OnnxGraph, value: str) -> None:
    last = out.nodes[-1]
    if list(last.output) == [value]:
        last.output[0] = OUTPUT_NAME
    else:
        out.nodes.append(helper.make_node("Identity", [value], [OUTPUT_NAME], name=OUTPUT_NAME))


def _step(out: OnnxGraph, node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        layer = modules[str(node.target)]
        rule = _MODULES.get(type(layer))
        hooked = layer._forward_hooks or layer._forward_pre_hooks
        if rule is None or hooked or len(node.args) != 1 or node.kwargs:
            raise UnsupportedOperator
        return rule(out, out.unique(str(node.target)), out.operand(node.args[0]), layer)
    function = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if function is None or not node.args:
        raise UnsupportedOperator
    first, *others = node.args
    rest = [out.operand(value) if isinstance(value, fx.Node) else value for value in others]
    try:
        return function(out, out.unique(node.name), out.operand(first), *rest, **node.kwargs)
    except TypeError:  # an argument that the rule does not have
        raise UnsupportedOperator from None
