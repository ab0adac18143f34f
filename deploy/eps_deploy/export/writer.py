"""The ONNX graph of a residual network, written step by step from its torch.fx graph.

torch's own exporter traces the network anew, decomposes and optimises it, which takes minutes on a
depth of hundreds. The networks at hand are made of a dozen operators that ONNX has under the same
names, so they are written down as they stand, with the names of the torch modules, by which an
engine's layers can be told apart. A network with anything else is left to torch's exporter.
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

from eps_compact import folding
from eps_core.errors import GraphError
from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME
from eps_deploy.export.types import belongs
from eps_train.data.dataset import DataIdentity
from eps_train.gating import rewriting
from eps_train.gating.tracing import acts_on_others
from eps_train.models.cifar import Downsample, Normalize

# -- A network's numbers in a smaller type, with a word when they do not fit


def narrow(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` on the CPU as `dtype`, contiguous and detached; integers stay what they are.

    Raises GraphError that names the tensor when a number in it is not finite in `dtype`.
    """
    value = tensor.detach().cpu().contiguous()
    if not value.is_floating_point():
        return value
    cast = value.to(dtype)
    if cast.isfinite().all():
        return cast
    if not value.isfinite().all():
        raise GraphError(
            f"{name}: holds a number that is not finite; train again from an earlier checkpoint"
        )
    raise GraphError(
        f"{name}: its largest number, {value.abs().max().item():.4g}, does not fit in"
        f" {str(dtype).removeprefix('torch.')} (at most {torch.finfo(dtype).max:.5g});"
        " use --bf16 or --fp32"
    )


def narrowed(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `network` in evaluation mode whose parameters and buffers are of type `dtype`.

    Batch norms are folded first where they can be, in float32: then they are rounded once, and
    torch's exporter leaves no float32 weight behind. Raises GraphError as `narrow` does.
    """
    copied = copy.deepcopy(network).eval()
    with contextlib.suppress(GraphError):  # what cannot be traced is not folded
        copied, _ = folding.fold(rewriting.trace(copied, one_mode=True))
    for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
        narrow(name, tensor, dtype)
    return copied.to(dtype)


# -- An ONNX graph in the making: its nodes, its constants, and which of its values are flat

KINDS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
}


class UnknownStep(Exception):
    """An operator, or a use of one, that is not written here."""


class OnnxGraph:
    """Nodes and constants so far.

    Attributes:
        nodes, tensors: of the ONNX graph, in order.
        dtype: type of the step that is being written: of its operands, constants and result.
        values: name of what each step of the torch.fx graph computes.
        flat: names of the values `[N, features]`; all others are `[N, C, H, W]`.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.dtype = torch.float32
        self.values: dict[fx.Node, str] = {}
        self.flat: set[str] = set()
        self._taken: set[str] = set()
        self._types: dict[str, torch.dtype] = {}

    def unused(self, name: str) -> str:
        """`name`, or a variant of it where a module is called more than once."""
        count = 1
        unique = name
        while unique in self._taken:
            count += 1
            unique = f"{name}#{count}"
        self._taken.add(unique)
        return unique

    def value(self, argument: object, *, flat: bool | None = None) -> str:
        """Name of an operand, cast if need be, and :meth:`shaped`."""
        if not isinstance(argument, fx.Node):
            raise UnknownStep
        name = self.values[argument]
        if self._types[name] is not self.dtype:
            name = self._cast(name)
        return self.shaped(name, flat=flat)

    def _cast(self, name: str) -> str:
        short = str(self.dtype).removeprefix("torch.")
        cast = f"{name}.{short}"
        if cast not in self._types:
            self._append("Cast", cast, [name], cast, to=KINDS[self.dtype])
            if name in self.flat:
                self.flat.add(cast)
        return cast

    def shaped(self, name: str, *, flat: bool | None) -> str:
        """`name`; with `flat` it must be `[N, features]` or, if False, `[N, C, H, W]`."""
        if flat is not None and flat != (name in self.flat):
            raise UnknownStep
        return name

    def tensor(self, name: str, value: Tensor) -> str:
        """A constant of the graph; integers stay what they are."""
        cast = narrow(name, value, self.dtype)
        raw = cast.view(torch.int16) if cast.dtype is torch.bfloat16 else cast
        self.tensors.append(
            TensorProto(
                name=name,
                data_type=KINDS[cast.dtype],
                dims=cast.shape,
                raw_data=raw.numpy().tobytes(),
            )
        )
        return name

    def add(
        self, kind: str, name: str, inputs: Sequence[str], *, flat: bool = False, **attributes: Any
    ) -> str:
        """One node; returns the name of what it computes."""
        value = f"{name}.out"
        self._append(kind, name, inputs, value, **attributes)
        if flat:
            self.flat.add(value)
        return value

    def _append(
        self, kind: str, name: str, inputs: Sequence[str], value: str, **attributes: Any
    ) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [value], name=name, **attributes))
        self._types[value] = self.dtype


# -- How each known step of a network is written in ONNX
#
# A rule gets the graph to write into, the name for its node, and the step. It raises `UnknownStep`
# for a use of its operator that ONNX has no equal of, or that no network needed so far.

LayerRule = Callable[[OnnxGraph, str, Any, str], str]  # graph, name, layer, operand
FunctionRule = Callable[[OnnxGraph, str, fx.Node], str]


def _conv(out: OnnxGraph, name: str, layer: nn.Conv2d, value: str) -> str:
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise UnknownStep
    operands = [out.shaped(value, flat=False), out.tensor(f"{name}.weight", layer.weight)]
    if layer.bias is not None:
        operands.append(out.tensor(f"{name}.bias", layer.bias))
    return out.add(
        "Conv",
        name,
        operands,
        kernel_shape=list(layer.kernel_size),
        strides=list(layer.stride),
        pads=[*layer.padding, *layer.padding],
        dilations=list(layer.dilation),
        group=layer.groups,
    )


def _batch_norm(out: OnnxGraph, name: str, layer: nn.BatchNorm2d, value: str) -> str:
    if layer.running_mean is None or layer.running_var is None:
        raise UnknownStep  # it judges by the batch at hand
    mean = layer.running_mean.double()
    scale = (layer.running_var.double() + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach().double()
    shift = -mean * scale
    if layer.bias is not None:
        shift = shift + layer.bias.detach().double()
    tensors = {
        "scale": scale,
        "shift": shift,
        "mean": torch.zeros_like(mean),
        "variance": torch.ones_like(mean),
    }
    operands = [out.tensor(f"{name}.{key}", tensor) for key, tensor in tensors.items()]
    value = out.shaped(value, flat=False)
    return out.add("BatchNormalization", name, [value, *operands], epsilon=0.0)


def _linear(out: OnnxGraph, name: str, layer: nn.Linear, value: str) -> str:
    operands = [out.shaped(value, flat=True), out.tensor(f"{name}.weight", layer.weight)]
    if layer.bias is not None:
        operands.append(out.tensor(f"{name}.bias", layer.bias))
    return out.add("Gemm", name, operands, flat=True, transB=1)


def _relu(out: OnnxGraph, name: str, layer: nn.Module, value: str) -> str:
    return out.add("Relu", name, [value], flat=value in out.flat)


def _nothing(out: OnnxGraph, name: str, layer: nn.Module, value: str) -> str:
    return value


def _empty(out: OnnxGraph, name: str, layer: nn.Sequential, value: str) -> str:
    if len(layer):
        raise UnknownStep
    return value


def _max_pool(out: OnnxGraph, name: str, layer: nn.MaxPool2d, value: str) -> str:
    if layer.return_indices:
        raise UnknownStep
    window = _window(layer.kernel_size, layer.stride, layer.padding, ceil=layer.ceil_mode)
    value = out.shaped(value, flat=False)
    return out.add("MaxPool", name, [value], **window, dilations=_pair(layer.dilation))


def _average_pool(out: OnnxGraph, name: str, layer: nn.AvgPool2d, value: str) -> str:
    return _average(
        out,
        name,
        out.shaped(value, flat=False),
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.ceil_mode,
        layer.count_include_pad,
        layer.divisor_override,
    )


def _global_pool(out: OnnxGraph, name: str, layer: nn.AdaptiveAvgPool2d, value: str) -> str:
    return _global_average(out, name, value, layer.output_size)


def _flatten(out: OnnxGraph, name: str, layer: nn.Flatten, value: str) -> str:
    return _flat(out, name, value, layer.start_dim, layer.end_dim)


# The functions' rules have their other arguments under torch's names, since they may come by them.


def _average(
    out: OnnxGraph,
    name: str,
    operand: str,
    /,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> str:
    if divisor_override is not None:
        raise UnknownStep
    window = _window(kernel_size, stride, padding, ceil=ceil_mode)
    counted = count_include_pad and any(window["pads"])
    return out.add("AveragePool", name, [operand], **window, count_include_pad=int(counted))


def _global_average(out: OnnxGraph, name: str, operand: str, /, output_size: Any) -> str:
    if _pair(output_size) != [1, 1]:
        raise UnknownStep
    return out.add("GlobalAveragePool", name, [out.shaped(operand, flat=False)])


def _flat(out: OnnxGraph, name: str, operand: str, /, start_dim: int = 0, end_dim: int = -1) -> str:
    if start_dim != 1 or end_dim not in (-1, 3):
        raise UnknownStep
    return out.add("Flatten", name, [out.shaped(operand, flat=False)], flat=True, axis=1)


def _padded(
    out: OnnxGraph, name: str, operand: str, /, pad: Any, mode: str = "constant", value: Any = None
) -> str:
    sizes = list(pad)
    if mode != "constant" or value not in (None, 0) or len(sizes) % 2 or len(sizes) > 8:
        raise UnknownStep
    sizes += [0] * (8 - len(sizes))
    # torch counts from the last dimension, a pair each; ONNX has all begins, then all ends.
    pads = torch.tensor([*sizes[-2::-2], *sizes[-1::-2]], dtype=torch.int64)
    return out.add("Pad", name, [operand, out.tensor(f"{name}.pads", pads)])


def _downsampled(out: OnnxGraph, name: str, layer: Downsample, value: str) -> str:
    pooled = _average(out, f"{name}.pool", out.shaped(value, flat=False), 2, ceil_mode=True)
    return _padded(out, f"{name}.pad", pooled, layer.padding)


def _window(kernel: Any, stride: Any, padding: Any, *, ceil: bool) -> dict[str, Any]:
    sizes, steps, pads = _pair(kernel), _pair(stride or kernel), _pair(padding)
    # A last window that starts beyond the image counts in ONNX and not in torch.
    if ceil and (any(pads) or any(a > b for a, b in zip(steps, sizes, strict=True))):
        raise UnknownStep
    return {
        "kernel_shape": sizes,
        "strides": steps,
        "pads": [*pads, *pads],
        "ceil_mode": int(ceil),
    }


def _pair(size: Any) -> list[int]:
    pair = [size, size] if isinstance(size, int) else list(size)
    if len(pair) != 2 or not all(isinstance(number, int) for number in pair):
        raise UnknownStep
    return pair


def _sum(out: OnnxGraph, name: str, node: fx.Node) -> str:
    if len(node.args) != 2 or node.kwargs:
        raise UnknownStep
    values = [out.value(argument) for argument in node.args]
    flat = {value in out.flat for value in values}
    if len(flat) != 1:
        raise UnknownStep
    return out.add("Add", name, values, flat=flat.pop())


def _on(
    rule: Callable[..., str], flat: bool | None = False
) -> Callable[[OnnxGraph, str, fx.Node], str]:
    """A rule for a function: its first operand, then its other arguments as torch has them."""

    def apply(out: OnnxGraph, name: str, node: fx.Node) -> str:
        if not node.args or any(isinstance(value, fx.Node) for value in node.args[1:]):
            raise UnknownStep
        value = out.value(node.args[0], flat=flat)
        try:
            return rule(out, name, value, *node.args[1:], **node.kwargs)
        except TypeError:  # an argument that the rule does not know
            raise UnknownStep from None

    return apply


def _rectified(out: OnnxGraph, name: str, operand: str, /, inplace: bool = False) -> str:
    return _relu(out, name, nn.ReLU(), operand)


def _copied(out: OnnxGraph, name: str, operand: str, /) -> str:
    return operand


def _scaled(out: OnnxGraph, name: str, operand: str, /, other: Any) -> str:
    if not isinstance(other, (int, float)):
        raise UnknownStep
    factor = out.tensor(f"{name}.factor", torch.tensor(float(other)))
    return out.add("Mul", name, [operand, factor], flat=operand in out.flat)


# Exact types: a subclass may compute something else.
LAYERS: dict[type[nn.Module], LayerRule] = {
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.Linear: _linear,
    nn.ReLU: _relu,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _global_pool,
    nn.Flatten: _flatten,
    Downsample: _downsampled,
    nn.Identity: _nothing,
    nn.Dropout: _nothing,
    nn.Sequential: _empty,
}
FUNCTIONS: dict[Any, FunctionRule] = {
    torch.add: _sum,
    operator.add: _sum,
    F.relu: _on(_rectified, None),
    torch.relu: _on(_rectified, None),
    F.avg_pool2d: _on(_average),
    F.adaptive_avg_pool2d: _on(_global_average),
    F.pad: _on(_padded),
    torch.flatten: _on(_flat),
    torch.clone: _on(_copied, None),
    torch.mul: _on(_scaled, None),
    operator.mul: _on(_scaled, None),
}

BATCH = "N"
_IR = 10  # of ONNX 1.17, the oldest that is supported: files say no more than they need


def write(
    network: fx.GraphModule,
    identity: DataIdentity,
    dtype: torch.dtype,
    opset: int,
    kept: Collection[str] = (),
) -> onnx.ModelProto | None:
    """The network behind its normalisation, or None when it holds an operator not known here.

    `images` uint8 `[N, C, H, W]` to `logits` float32 `[N, classes]`; between the normalisation,
    which is done in float32, and the logits everything is of type `dtype`. Batch norms that stand
    alone become one scale and one shift a channel, computed in float64.

    Args:
        network: in evaluation mode, float32, without gates, of normalised images.
        identity: image shape, mean, std and classes.
        dtype: float32, float16 or bfloat16.
        opset: of ONNX; bfloat16 convolutions need 22.
        kept: names of blocks or modules that are in float32 all the same, with their additions.

    Raises:
        GraphError: a number that is not finite in `dtype`; the tensor is named.
    """
    out = OnnxGraph()
    try:
        _write(out, network, identity, dtype, kept)
    except UnknownStep:
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


def _write(
    out: OnnxGraph,
    network: fx.GraphModule,
    identity: DataIdentity,
    dtype: torch.dtype,
    kept: Collection[str],
) -> None:
    modules = dict(network.named_modules(remove_duplicate=False))
    for node in network.graph.nodes:
        if acts_on_others(node, modules):
            raise UnknownStep  # ONNX has values, not memory
        wide = node.op in ("placeholder", "output") or _is_kept(node, kept)
        out.dtype = torch.float32 if wide else dtype
        if node.op == "placeholder" and not out.values:
            out.values[node] = _normalised(out, identity)
        elif node.op == "output":
            _finish(out, out.value(node.args[0], flat=True))
        else:
            out.values[node] = _step(out, node, modules)


def _is_kept(node: fx.Node, kept: Collection[str]) -> bool:
    """Whether a step is of one of the blocks; a function is where one of its operands is."""
    if node.op != "call_module":
        operands = (source for source in node.all_input_nodes if source.op == "call_module")
        return any(_is_kept(source, kept) for source in operands)
    return belongs(str(node.target), kept)


def _normalised(out: OnnxGraph, identity: DataIdentity) -> str:
    normalize = Normalize.of(identity)
    mean = out.tensor("normalize.mean", normalize.mean)
    std = out.tensor("normalize.std", normalize.std)
    pixels = out.add("Cast", out.unused("normalize.cast"), [INPUT_NAME], to=TensorProto.FLOAT)
    centred = out.add("Sub", out.unused("normalize.sub"), [pixels, mean])
    return out.add("Div", out.unused("normalize.div"), [centred, std])


def _finish(out: OnnxGraph, value: str) -> None:
    last = out.nodes[-1]
    if list(last.output) == [value]:
        last.output[0] = OUTPUT_NAME
    else:
        out.nodes.append(helper.make_node("Identity", [value], [OUTPUT_NAME], name=OUTPUT_NAME))


def _step(out: OnnxGraph, node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        layer = modules[str(node.target)]
        rule = LAYERS.get(type(layer))
        if rule is None or _hooked(layer) or len(node.args) != 1 or node.kwargs:
            raise UnknownStep
        return rule(out, out.unused(str(node.target)), layer, out.value(node.args[0]))
    function = FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if function is None:
        raise UnknownStep
    return function(out, out.unused(node.name), node)


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)
