"""Recomputes an exported network from its two files, with numpy and safetensors alone.

    python numpy_reader.py compact.safetensors images.npy logits.npy

What stands here is all that a reader in another language needs to know for the networks of the
families `cifar` and `imagenet`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


def pad(self: Any, pad: Any, mode: Any, value: Any) -> Any:
    assert mode == "constant"
    pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]  # the last dimension first
    widths = [(0, 0)] * (self.ndim - len(pairs)) + pairs[::-1]
    return np.pad(self, widths, constant_values=value or 0)


def windows(x: Any, size: Any, stride: Any) -> Any:
    found = np.lib.stride_tricks.sliding_window_view(x, size, axis=(2, 3))
    return found[:, :, :: stride[0], :: stride[1]]  # [N, C, H, W, size, size]


def conv2d(
    input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> Any:
    assert dilation == [1, 1]
    assert groups == 1
    x = pad(input, [padding[1], padding[1], padding[0], padding[0]], "constant", 0)
    out = np.einsum("nchwij,ocij->nohw", windows(x, weight.shape[2:], stride), weight)
    return out if bias is None else out + bias[:, None, None]


def batch_norm(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: Any, eps: Any
) -> Any:
    scale = weight / np.sqrt(running_var + eps)
    shift = bias - running_mean * scale
    return (input * scale[:, None, None] + shift[:, None, None], None, None)


def avg_pool2d(
    self: Any, kernel_size: Any, stride: Any, padding: Any, ceil_mode: Any, **rest: Any
) -> Any:
    assert ceil_mode
    assert padding == [0, 0]
    stride = stride or kernel_size
    over = [-(size - k) % s for size, k, s in zip(self.shape[2:], kernel_size, stride, strict=True)]
    x = pad(self, [0, over[1], 0, over[0]], "constant", 0)
    ones = pad(np.ones_like(self), [0, over[1], 0, over[0]], "constant", 0)
    sums, counts = (windows(a, kernel_size, stride).sum((4, 5)) for a in (x, ones))
    return sums / counts


def max_pool2d(
    self: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any
) -> Any:
    assert dilation in ([1, 1], 1)
    x = pad(self, [padding[1], padding[1], padding[0], padding[0]], "constant", -np.inf)
    return windows(x, kernel_size, stride).max((4, 5))


def adaptive_avg_pool2d(self: Any, output_size: Any) -> Any:
    assert output_size == [1, 1]
    return self.mean((2, 3), keepdims=True)


OPERATORS: dict[str, Any] = {
    "aten._to_copy": lambda self, dtype, **rest: self.astype(dtype),
    "aten.sub.Tensor": lambda self, other, alpha: self - other,
    "aten.div.Tensor": lambda self, other: self / other,
    "aten.add.Tensor": lambda self, other, alpha: self + alpha * other,
    "aten.relu": lambda self: np.maximum(self, 0),
    "aten.linear": lambda input, weight, bias: input @ weight.T + bias,
    "aten.view": lambda self, size, **rest: self.reshape(size),
    "aten.reshape": lambda self, shape: self.reshape(shape),
    "aten.sym_size.int": lambda self, dim: self.shape[dim],
    "aten.pad": pad,
    "aten.conv2d": conv2d,
    "aten._native_batch_norm_legit_no_training": batch_norm,
    "aten.avg_pool2d": avg_pool2d,
    "aten.max_pool2d": max_pool2d,
    "aten.adaptive_avg_pool2d": adaptive_avg_pool2d,
    "getitem": lambda input, index: input[index],
}


def read(path: Any, images: Any) -> Any:
    described = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    tensors = load_file(path)
    results = {described["input"]["name"]: images}

    def value(argument: Any) -> Any:
        if isinstance(argument, list):
            return [value(item) for item in argument]
        if not isinstance(argument, dict):
            return argument
        ((kind, name),) = argument.items()
        if kind == "step":
            return results[name]
        return tensors[name] if kind == "tensor" else name

    for step in described["steps"]:
        inputs = {key: value(argument) for key, argument in step["inputs"].items()}
        result = OPERATORS[step["op"]](**inputs)
        if step["shape"] is not None:
            shape = [len(images) if size == "N" else size for size in step["shape"]]
            assert list(result.shape) == shape, step
        results[step["name"]] = result
    return value(described["result"])


if __name__ == "__main__":
    np.save(sys.argv[3], read(sys.argv[1], np.load(sys.argv[2])))
