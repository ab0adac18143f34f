"""Pools, as every engine at hand reads them: ONNX Runtime, ONNX's own evaluator, and torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from eps_core.errors import GraphError
from eps_deploy.engines.ort import OrtEngine
from eps_deploy.export.export import Deployed, export_onnx, resolve_ceil_mode
from eps_train.gating import rewriting
from eps_train.models.resnets import Downsample
from tests.deploy.export.test_export import identity

Array = npt.NDArray[np.float32]
IMAGE = np.random.default_rng(0).normal(3, 1, (2, 1, 7, 8)).astype(np.float32)


def model_of(kind: str, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node(kind, ["x"], ["y"], name="pool", **attributes)
    value = helper.make_tensor_value_info
    found = helper.make_graph(
        [node],
        "pool",
        [value("x", TensorProto.FLOAT, ["N", *IMAGE.shape[1:]])],
        [value("y", TensorProto.FLOAT, ["N", 1, "H", "W"])],
    )
    return helper.make_model(found, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def answers(model: onnx.ModelProto) -> Iterator[Array]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    yield session.run(None, {"x": IMAGE})[0]
    evaluator: Any = ReferenceEvaluator(model)
    yield evaluator.run(None, {"x": IMAGE})[0]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_average_pools_are_torchs_in_every_engine(kernel: int, padding: int, counted: bool) -> None:
    for stride in (1, 2, 3):
        model = model_of(
            "AveragePool",
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[padding] * 4,
            ceil_mode=1,
            count_include_pad=int(counted),
        )
        resolve_ceil_mode(model)
        onnx.checker.check_model(model, full_check=True)
        pool = nn.AvgPool2d(kernel, stride, padding, ceil_mode=True, count_include_pad=counted)
        expected = pool(torch.from_numpy(IMAGE)).numpy()
        for found in answers(model):
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_max_pools_are_torchs_in_every_engine() -> None:
    for kernel, stride, padding in itertools.product((2, 3), (1, 2, 3), (0, 1)):
        model = model_of(
            "MaxPool",
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[padding] * 4,
            ceil_mode=1,
        )
        resolve_ceil_mode(model)
        pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=True)
        expected = pool(torch.from_numpy(IMAGE)).numpy()
        for found in answers(model):
            np.testing.assert_array_equal(found, expected)


class Pooled(nn.Module):
    """A convolution, a pool, and a classifier for images `[3, 7, 8]`."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3, padding=1), pool
        self.head, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.head(self.pool(self.conv(x))).flatten(1))
        return logits


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 3, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(2, 2, ceil_mode=True),
    ],
    ids=["beyond", "padded", "padding not counted", "halved"],
)
def test_a_network_with_such_a_pool_is_exported_without_ceil_mode(
    pool: nn.Module, tmp_path: Path
) -> None:
    """By our own writer and by torch's exporter."""
    torch.manual_seed(0)
    network = rewriting.trace(Pooled(pool).eval(), one_mode=True)
    data = identity((7, 8), 3)
    path = tmp_path / "model.onnx"
    export_onnx(network, data, path)
    model = onnx.load(path)
    pools = [node for node in model.graph.node if node.op_type == "AveragePool"]
    assert pools
    assert not any(item.name == "ceil_mode" and item.i for n in pools for item in n.attribute)
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 7, 8), dtype=np.uint8)
    expected = Deployed(network, data).infer(images)
    limit = 1e-5 * np.abs(expected).max()
    with OrtEngine(path.read_bytes()) as engine:
        np.testing.assert_allclose(engine.infer(images), expected, rtol=0, atol=limit)
    evaluator: Any = ReferenceEvaluator(model)
    (said,) = evaluator.run(None, {"images": images})
    np.testing.assert_allclose(said, expected, rtol=0, atol=limit)


def test_a_shortcut_that_halves_an_odd_image(tmp_path: Path) -> None:
    model = model_of("AveragePool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    resolve_ceil_mode(model)
    expected = Downsample(1, 1)(torch.from_numpy(IMAGE)).detach().numpy()
    for found in answers(model):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_image_size_that_is_not_fixed_is_rejected() -> None:
    model = model_of("AveragePool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    with pytest.raises(GraphError, match="pool: an average pool with ceil_mode whose image size"):
        resolve_ceil_mode(model)
