"""float16 as its file says it: rounded after every operation, infinite beyond 65504."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import fx, nn

from eps_deploy.engines.base import Images, Logits
from eps_deploy.engines.ort import OrtEngine
from eps_deploy.export.export import export_onnx, in_precision
from eps_deploy.export.quantize import pick, quantize
from eps_deploy.export.types import FLOAT16_MAX, float16_peak, round_to_float16
from eps_deploy.precision import PRECISIONS
from eps_train.data import dataset
from eps_train.gating import rewriting
from eps_train.models.spec import NetworkSpec

DIGITS = dataset.load("digits")
GAIN = 60_000.0


@cache
def network(gain: float = 1.0) -> fx.GraphModule:
    """The last activation is `gain` times as large, which the classifier takes back."""
    torch.manual_seed(0)
    spec = NetworkSpec.parse("cifar:8x4", in_channels=1, classes=10)
    model = rewriting.drop_taps(rewriting.drop_gates(spec.build())).eval()
    with torch.no_grad():
        model.get_parameter("head.0.weight").mul_(gain)
        model.get_parameter("classifier.weight").div_(gain)
    return model


def exported(folder: Path, name: str, gain: float = 1.0, kept: tuple[str, ...] = ()) -> bytes:
    path = folder / "model.onnx"
    precision = PRECISIONS[name]
    export_onnx(network(gain), DIGITS.identity, path, precision=precision, kept=kept)
    content = path.read_bytes()
    if precision.quantized:
        content = quantize(content, pick(DIGITS, 100), precision)
    return content


def images(count: int) -> Images:
    found: Images = DIGITS.test.images[:count].numpy()
    return found


def logits(model: bytes, count: int) -> Logits:
    with OrtEngine(model, exact_qdq=True) as engine:
        return engine.infer(images(count))


@pytest.mark.parametrize(("name", "near"), [("fp16", 4e-3), ("int8-fp16", 5e-2)])
def test_it_is_what_the_file_says(tmp_path: Path, name: str, near: float) -> None:
    """Against ONNX's own evaluator, which computes float16 in float16."""
    model = exported(tmp_path, name)
    evaluator: Any = ReferenceEvaluator(onnx.load_from_string(model))
    (expected,) = evaluator.run(None, {"images": images(4)})
    found = logits(round_to_float16(model), 4)
    np.testing.assert_allclose(found, expected, rtol=0, atol=near * np.abs(found).max())
    wide = {
        tensor.data_type
        for tensor in onnx.load_from_string(round_to_float16(model)).graph.initializer
    }
    assert onnx.TensorProto.FLOAT16 not in wide


def test_it_is_nearer_to_torchs_float16_than_to_float32(tmp_path: Path) -> None:
    model = exported(tmp_path, "fp16")
    half = in_precision(network(), DIGITS.identity, PRECISIONS["fp16"]).infer(images(32))
    found, wide = logits(round_to_float16(model), 32), logits(model, 32)
    assert np.abs(found - half).mean() < np.abs(found - wide).mean()


def test_what_overflows_in_float16_is_not_finite(tmp_path: Path) -> None:
    model = exported(tmp_path, "fp16", GAIN)
    half = in_precision(network(GAIN), DIGITS.identity, PRECISIONS["fp16"]).infer(images(8))
    finite = np.isfinite(half)
    assert not finite.all()
    assert (np.isfinite(logits(round_to_float16(model), 8)) == finite).all()
    assert np.isfinite(logits(model, 8)).all(), "which ONNX Runtime does not show on a CPU"


def test_what_is_kept_in_float32_does_not_overflow(tmp_path: Path) -> None:
    model = exported(tmp_path, "fp16", GAIN, kept=("head", "classifier"))
    assert np.isfinite(logits(round_to_float16(model), 8)).all()


@pytest.mark.parametrize("gain", [1.0, GAIN])
def test_the_peak_is_the_largest_activation(tmp_path: Path, gain: float) -> None:
    """Measured in float32, so that it is known how far beyond the end it is."""
    found = float16_peak(exported(tmp_path, "fp16", gain), images(20), 8)
    seen: list[float] = []
    model = in_precision(network(gain), DIGITS.identity, PRECISIONS["fp32"])
    hooks = [
        layer.register_forward_hook(lambda _, __, value: seen.append(value.abs().max().item()))
        for layer in model.modules()
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU))
    ]
    model.infer(images(20))
    for hook in hooks:
        hook.remove()
    assert (found.value > FLOAT16_MAX) == (gain > 1)
    if gain > 1:
        assert found.value == pytest.approx(max(seen), rel=1e-2)
        assert found.node.startswith("head.")
    else:
        assert found.value > 0
