"""int8: what is quantized and what is not, how well, and what is rejected."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from eps_core.errors import DataError, GraphError
from eps_deploy.bench.accuracy import AGREEMENT_LIMITS, PARITY_LIMITS
from eps_deploy.engines.base import Images, Logits
from eps_deploy.engines.ort import OrtEngine
from eps_deploy.export import quantize as calibration
from eps_deploy.export.export import Deployed, export_onnx
from eps_deploy.export.quantize import Method, quantize
from eps_deploy.export.types import executed_types, layer_types
from eps_deploy.precision import PRECISIONS
from eps_train.data import dataset
from eps_train.gating import rewriting
from eps_train.models.spec import NetworkSpec

KINDS = ("int8", "int8-fp16")


@cache
def digits() -> dataset.Data:
    return dataset.load("digits")


@cache
def images() -> Images:
    return calibration.pick(digits(), 200)


@cache
def network() -> nn.Module:
    torch.manual_seed(0)
    spec = NetworkSpec.parse("cifar:14x8", in_channels=1, classes=10)
    return rewriting.drop_taps(rewriting.drop_gates(spec.build())).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("exported")
    for kind in KINDS:
        path = folder / kind
        export_onnx(network(), digits().identity, path, precision=PRECISIONS[kind], source="abc123")
    return {kind: (folder / kind).read_bytes() for kind in KINDS}


@pytest.fixture(scope="module")
def quantized(exported: dict[str, bytes]) -> dict[str, bytes]:
    return {kind: quantize(exported[kind], images(), PRECISIONS[kind]) for kind in KINDS}


def logits(model: bytes, *, exact: bool = True) -> Logits:
    with OrtEngine(model, exact_qdq=exact) as engine:
        return engine.infer(digits().test.images.numpy()[:200])


def error(found: Logits) -> float:
    expected = Deployed(network(), digits().identity).infer(digits().test.images.numpy()[:200])
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_nearly_what_float32_does(quantized: dict[str, bytes], kind: str) -> None:
    assert 1e-4 < error(logits(quantized[kind])) <= PARITY_LIMITS[kind]
    assert error(logits(quantized[kind], exact=False)) <= PARITY_LIMITS[kind]


@pytest.mark.parametrize("method", calibration.METHODS)
def test_every_method_does(exported: dict[str, bytes], method: Method) -> None:
    model = quantize(exported["int8"], images(), PRECISIONS["int8"], method=method)
    assert error(logits(model)) <= PARITY_LIMITS["int8"]


@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_are_int8(quantized: dict[str, bytes], kind: str) -> None:
    types = layer_types(onnx.load_from_string(quantized[kind]))
    assert len(types) == 14
    assert set(types.values()) == {"int8"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_tensorrt_rejects_is_not_in_it(quantized: dict[str, bytes], kind: str) -> None:
    """Zero points, unsigned integers, and integer biases."""
    graph = onnx.load_from_string(quantized[kind]).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kinds = {"QuantizeLinear", "DequantizeLinear"}
    steps = [node for node in graph.node if node.op_type in kinds]
    assert {node.op_type for node in steps} == kinds
    for node in steps:
        assert constants[node.input[2]].dtype == np.int8
        assert not constants[node.input[2]].any()
        assert (constants[node.input[1]] > 0).all()
    assert {array.dtype for array in constants.values()} <= {
        np.dtype(name) for name in ("int8", "int64", "float16", "float32")
    }


@pytest.mark.parametrize(("kind", "dtype"), [("int8", np.float32), ("int8-fp16", np.float16)])
def test_weights_are_stored_as_int8_with_a_scale_for_each_channel(
    quantized: dict[str, bytes], kind: str, dtype: type
) -> None:
    tensors = onnx.load_from_string(quantized[kind]).graph.initializer
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
    small, scale = (constants[f"stages.1.0.conv1.weight.{part}"] for part in ("int8", "scale"))
    assert small.dtype == np.int8
    assert scale.dtype == dtype
    assert (small.shape, scale.shape) == ((16, 8, 3, 3), (16,))
    assert (np.abs(small).reshape(16, -1).max(axis=1) == 127).all()
    assert "stages.1.0.conv1.weight" not in constants


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_before_the_first_convolution_is_quantized(
    quantized: dict[str, bytes], kind: str
) -> None:
    names = [node.op_type for node in onnx.load_from_string(quantized[kind]).graph.node]
    before = names[: names.index("QuantizeLinear")]
    assert [name for name in before if name != "Cast"] == ["Sub", "Div"]


def addends(model: bytes) -> dict[str, list[str]]:
    """The operators that make the operands of each addition, by its name."""
    nodes = onnx.load_from_string(model).graph.node
    makers = {output: node.op_type for node in nodes for output in node.output}
    sums = [node for node in nodes if node.op_type == "Add"]
    return {node.name: sorted(makers[name] for name in node.input) for node in sums}


def test_onnx_runtime_adds_an_unrounded_shortcut(quantized: dict[str, bytes]) -> None:
    found = list(addends(quantized["int8"]).values())
    assert len(found) == 6
    assert all(operands.count("DequantizeLinear") == 1 for operands in found)
    nodes = onnx.load_from_string(quantized["int8"]).graph.node
    sums = {output for node in nodes if node.op_type == "Add" for output in node.output}
    assert not [n for n in nodes if n.op_type == "QuantizeLinear" and n.input[0] in sums]


def test_tensorrt_adds_a_rounded_shortcut_to_a_convolution(quantized: dict[str, bytes]) -> None:
    """So that it can fuse the addition into the convolution."""
    assert list(addends(quantized["int8-fp16"]).values()) == [["Conv", "DequantizeLinear"]] * 6


def test_a_shortcut_to_a_block_that_is_kept_is_not_rounded(exported: dict[str, bytes]) -> None:
    precision = PRECISIONS["int8-fp16"]
    model = quantize(exported["int8-fp16"], images(), precision, kept=("stages.1",))
    rounded = ["DequantizeLinear" in operands for operands in addends(model).values()]
    assert rounded == [True, True, False, False, True, True]


def test_of_two_convolutions_the_projection_is_the_shortcut(tmp_path: Path) -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 4, 3)
            self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.projection, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            x = self.second(self.first(x).relu()) + self.projection(x)
            logits: torch.Tensor = self.head(x.relu().mean((2, 3)))
            return logits

    torch.manual_seed(0)
    precision = PRECISIONS["int8-fp16"]
    export_onnx(Projected().eval(), digits().identity, tmp_path / "model", precision=precision)
    content = quantize((tmp_path / "model").read_bytes(), images(), precision)
    graph = onnx.load_from_string(content).graph
    (rounded,) = (node for node in graph.node if node.op_type == "Add")
    makers = {output: node for node in graph.node for output in node.output}
    (shortcut,) = (
        makers[makers[makers[name].input[0]].input[0]].input[1]
        for name in rounded.input
        if makers[name].op_type == "DequantizeLinear"
    )
    assert shortcut == "network.projection.weight.rounded"


def test_onnx_runtime_really_computes_in_int8(quantized: dict[str, bytes]) -> None:
    """But for the classifier, whose logits stay in float32; and only if it is let to."""
    assert executed_types(quantized["int8"]) == {"float32": 1, "int8": 13}
    assert executed_types(quantized["int8"], exact_qdq=True) == {"float32": 14}


def test_the_same_images_give_the_same_bytes_in_silence(
    exported: dict[str, bytes],
    quantized: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for kind in KINDS:
        assert quantize(exported[kind], images(), PRECISIONS[kind]) == quantized[kind]
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_metadata_say_how_it_was_calibrated(quantized: dict[str, bytes]) -> None:
    model = onnx.load_from_string(quantized["int8-fp16"])
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["eps_resnet.precision"] == "int8-fp16"
    assert facts["eps_resnet.source_sha256"] == "abc123"
    assert facts["eps_resnet.calibration_method"] == "minmax"
    assert facts["eps_resnet.calibration_samples"] == "200"
    assert facts["eps_resnet.calibration_sha256"] == calibration.digest(images())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_can_be_kept(exported: dict[str, bytes], kind: str) -> None:
    precision = PRECISIONS[kind]
    model = quantize(exported[kind], images(), precision, kept=("stages.1", "stem.0"))
    types = layer_types(onnx.load_from_string(model))
    kept = {name for name, found in types.items() if found == precision.float}
    assert kept == {"stem.0", *(f"stages.1.{b}.conv{c}" for b in (0, 1) for c in (1, 2))}
    assert error(logits(model)) <= PARITY_LIMITS[kind]


def test_a_set_that_is_too_small_is_rejected(exported: dict[str, bytes]) -> None:
    with pytest.raises(DataError, match=r"99 calibration images: too few .* at least 100"):
        quantize(exported["int8"], images()[:99], PRECISIONS["int8"])


def test_a_network_with_nothing_to_quantize_is_rejected(exported: dict[str, bytes]) -> None:
    everything = ("stem", "stages", "classifier")
    with pytest.raises(GraphError, match="--int8: no convolution"):
        quantize(exported["int8"], images(), PRECISIONS["int8"], kept=everything)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_channel_and_a_dead_layer_have_a_scale(tmp_path: Path, kind: str) -> None:
    """All weights 0: any scale is right, but none may be 0 or, in float16, become 0."""
    torch.manual_seed(0)
    spec = NetworkSpec.parse("cifar:8x4", in_channels=1, classes=10)
    model = rewriting.drop_taps(rewriting.drop_gates(spec.build())).eval()
    with torch.no_grad():
        model.get_parameter("stages.0.0.conv1.weight")[1] = 1e-12
        model.get_parameter("stages.1.0.conv1.weight").zero_()
    export_onnx(model, digits().identity, tmp_path / "model", precision=PRECISIONS[kind])
    content = quantize((tmp_path / "model").read_bytes(), images(), PRECISIONS[kind])
    constants = onnx.load_from_string(content).graph.initializer
    scales = [numpy_helper.to_array(item) for item in constants if item.name.endswith(".scale")]
    assert all((scale > 0).all() for scale in scales)
    assert np.isfinite(logits(content)).all()


def test_every_precision_has_its_limits() -> None:
    assert PARITY_LIMITS.keys() == AGREEMENT_LIMITS.keys() == PRECISIONS.keys()


def test_float16_scales_are_not_float32(quantized: dict[str, bytes]) -> None:
    tensors = onnx.load_from_string(quantized["int8-fp16"]).graph.initializer
    kinds = {tensor.data_type for tensor in tensors if tensor.name.endswith(".scale")}
    assert kinds == {TensorProto.FLOAT16}
