"""How each known step of a network is written in ONNX.

A rule gets the graph to write into, the name for its node, and the step. It raises `UnknownStep`
for a use of its operator that ONNX has no equal of, or that no network needed so far.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from eps_deploy.exporting.onnx_graph import OnnxGraph, UnknownStep
from eps_train.networks import Downsample

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
