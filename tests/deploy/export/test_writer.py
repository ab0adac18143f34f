"""The written graph: what it writes computes what torch does, and what it cannot it leaves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from eps_deploy.engines.ort import OrtEngine
from eps_deploy.export import writer
from eps_deploy.export.export import Deployed
from eps_train.gating import rewriting
from eps_train.models.spec import NetworkSpec
from tests.deploy.export.test_export import identity

DATA = identity((9, 11), 6)


class Ends(nn.Module):
    """Layers between a stem of 6 channels and a head that counts them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.middle = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.between(self.stem(x)))
        return logits

    def between(self, x: Tensor) -> Tensor:
        result: Tensor = self.middle(x)
        return result


class Function(Ends):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def between(self, x: Tensor) -> Tensor:
        return self.function(x)


class Shared(Ends):
    """One ReLU, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(6, 6, 1)

    def between(self, x: Tensor) -> Tensor:
        rectified: Tensor = self.relu(self.conv(self.relu(x)))
        return rectified


def norm(**arguments: bool) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(6, **arguments)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(6, generator=generator) + (0.1 if "var" in name else -0.3))
    return layer


def written(model: nn.Module, dtype: torch.dtype = torch.float32) -> onnx.ModelProto | None:
    return writer.write(rewriting.trace(model.eval()), DATA, dtype, 18)


USUAL = {
    "grouped, dilated, strided": lambda: Ends(nn.Conv2d(6, 6, 3, 2, 2, dilation=2, groups=3)),
    "oblong": lambda: Ends(nn.Conv2d(6, 6, (1, 3), (2, 1), (0, 1), bias=False)),
    "batch norm": lambda: Ends(norm(), nn.ReLU()),
    "batch norm without weights": lambda: Ends(norm(affine=False)),
    "max pool": lambda: Ends(nn.MaxPool2d(3, 2, 1)),
    "max pool, rounded up": lambda: Ends(nn.MaxPool2d(2, ceil_mode=True)),
    "dilated max pool": lambda: Ends(nn.MaxPool2d(2, 1, dilation=2)),
    "average pool": lambda: Ends(nn.AvgPool2d(3, 2, 1)),
    "average pool that counts no padding": lambda: Ends(
        nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    ),
    "average pool, rounded up": lambda: Ends(nn.AvgPool2d(2, ceil_mode=True)),
    "nothing": lambda: Ends(nn.Identity(), nn.Dropout(0.5)),
    "shared ReLU": Shared,
    "relu": lambda: Function(F.relu),
    "torch.relu": lambda: Function(torch.relu),
    "doubled": lambda: Function(lambda x: x + x),
    "padded channels": lambda: Function(lambda x: F.pad(x, (1, 2, 3, 0))),
    "average": lambda: Function(lambda x: F.avg_pool2d(x, 2, ceil_mode=True)),
}
UNUSUAL = {
    "padding by name": lambda: Ends(nn.Conv2d(6, 6, 3, padding="same")),
    "reflecting": lambda: Ends(nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")),
    "judged by the batch": lambda: Ends(norm(track_running_stats=False)),
    "indices": lambda: Ends(nn.MaxPool2d(2, return_indices=True)),
    "window beyond the image": lambda: Ends(nn.MaxPool2d(2, 2, 1, ceil_mode=True)),
    "own divisor": lambda: Ends(nn.AvgPool2d(2, divisor_override=3)),
    "pooled to 2x2": lambda: Ends(nn.AdaptiveAvgPool2d(2)),
    "linear in four dimensions": lambda: Ends(nn.Linear(11, 11)),
    "another activation": lambda: Ends(nn.SiLU()),
    "its own ReLU": lambda: Ends(type("Leaky", (nn.ReLU,), {})()),
    "with a constant": lambda: Function(lambda x: x + 1),
    "reflected": lambda: Function(lambda x: F.pad(x, (1, 1), mode="reflect")),
    "filled": lambda: Function(lambda x: F.pad(x, (1, 1), value=2.0)),
    "written into what others read": lambda: Function(lambda x: F.relu(x, inplace=True) + x),
    "scaled": lambda: Function(lambda x: torch.add(x, x, alpha=2)),
}


@pytest.mark.parametrize("make", USUAL.values(), ids=USUAL)
def test_it_computes_what_torch_does(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    proto = written(model)
    assert proto is not None
    onnx.checker.check_model(proto, full_check=True)
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 9, 11), dtype=np.uint8)
    expected = Deployed(model, DATA).infer(images)
    with OrtEngine(proto.SerializeToString()) as engine:
        found = engine.infer(images)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_what_it_does_not_know_it_leaves(make: Callable[[], nn.Module]) -> None:
    assert written(make()) is None


def test_a_hook_may_do_anything() -> None:
    model = Ends(nn.ReLU())
    traced = rewriting.trace(model.eval())
    traced.get_submodule("middle.0").register_forward_hook(lambda layer, args, result: result * 2)
    assert writer.write(traced, DATA, torch.float32, 18) is None


@pytest.mark.parametrize("model", ["cifar:14x4", "imagenet:18x4", "imagenet:50x4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_our_own_families_are_written(model: str, dtype: torch.dtype) -> None:
    spec = NetworkSpec.parse(model, in_channels=3, classes=6)
    network = rewriting.drop_taps(rewriting.drop_gates(spec.build())).eval()
    assert isinstance(network, fx.GraphModule)
    proto = writer.write(network, identity((32, 32), 6), dtype, 18)
    assert proto is not None
    onnx.checker.check_model(proto, full_check=True)
