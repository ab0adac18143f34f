"""The exported graph: sound, truly dynamic, quiet, repeatable, and equal to torch."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from eps_core.errors import GraphError
from eps_core.preprocessing import Preprocessing
from eps_deploy.engines.ort import OrtEngine
from eps_deploy.export.export import Deployed, export_onnx, in_precision
from eps_deploy.export.types import layer_types
from eps_deploy.precision import PRECISIONS
from eps_train.data import dataset
from eps_train.data.dataset import DataIdentity
from eps_train.gating import rewriting
from eps_train.models.spec import NetworkSpec


def identity(shape: tuple[int, int], classes: int) -> DataIdentity:
    return replace(
        dataset.load("digits").identity,
        classes=tuple(f"class {index}" for index in range(classes)),
        mean=(120.0, 110.0, 100.0),
        std=(60.0, 61.0, 62.0),
        preprocessing=Preprocessing(resize=shape, crop=shape, color="rgb"),
    )


def network(classes: int) -> nn.Module:
    torch.manual_seed(0)
    spec = NetworkSpec.parse("cifar:8x4", in_channels=3, classes=classes)
    return rewriting.drop_taps(rewriting.drop_gates(spec.build()))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of odd, non-square RGB images: there the shortcut's pooling has to round up."""
    path = tmp_path_factory.mktemp("export") / "odd.onnx"
    export_onnx(network(3), identity((9, 11), 3), path, source="abc123")
    return path


@pytest.mark.parametrize("batch", [1, 2, 3, 33])
def test_it_computes_what_torch_does_at_every_batch(exported: Path, batch: int) -> None:
    images = np.random.default_rng(batch).integers(0, 256, (batch, 3, 9, 11), dtype=np.uint8)
    expected = Deployed(network(3), identity((9, 11), 3)).infer(images)
    with OrtEngine(exported.read_bytes()) as engine:
        found = engine.infer(images)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_one_file_with_the_weights_inside(exported: Path) -> None:
    assert [path.name for path in exported.parent.iterdir()] == ["odd.onnx"]
    model = onnx.load(exported, load_external_data=False)
    stored = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    learned = sum(p.numel() for p in network(3).parameters() if p.dim() == 4)
    assert stored > learned


def test_metadata_says_where_it_comes_from(exported: Path) -> None:
    model = onnx.load(exported)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["eps_resnet.source_sha256"] == "abc123"
    assert facts["eps_resnet.version"] == model.producer_version != ""


def test_nothing_of_this_machine_is_in_it(exported: Path) -> None:
    """The exporter notes the Python stack, with its paths, at every node."""
    content = exported.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert b".py" not in content


def test_node_names_are_those_of_the_modules(exported: Path) -> None:
    names = [node.name for node in onnx.load(exported).graph.node]
    modules = [name for name, _ in network(3).named_modules()]
    assert {"stem.0", "stages.2.0.conv2", "classifier"} <= set(names) & set(modules)
    assert len(set(names)) == len(names)


def test_the_same_network_gives_the_same_bytes_in_silence(
    exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Warnings would be errors here; what the exporter prints would be seen."""
    model = network(3).train()
    export_onnx(model, identity((9, 11), 3), tmp_path / "again.onnx", source="abc123")
    assert (tmp_path / "again.onnx").read_bytes() == exported.read_bytes()
    assert capfd.readouterr() == ("", "")
    assert model.training


class Unusual(nn.Module):
    """Of operators that only torch's own exporter knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(nn.functional.silu(self.norm(self.conv(x))).mean((2, 3)))
        return logits


def test_torch_s_own_exporter_writes_what_is_unusual(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where it notes the Python stack, with its paths, at every node."""
    path = tmp_path / "model.onnx"
    export_onnx(Unusual(), identity((8, 8), 3), path, source="abc123")
    assert capfd.readouterr() == ("", "")
    content = path.read_bytes()
    assert b".py" not in content
    assert onnx.load(path).graph.node[0].name == "0000_Cast"
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    expected = Deployed(Unusual(), identity((8, 8), 3)).infer(images)
    with OrtEngine(content) as engine:
        assert np.abs(engine.infer(images) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("precision", "dtype", "opset"),
    [
        ("fp32", "float32", 18),
        ("tf32", "float32", 18),
        ("fp16", "float16", 18),
        ("bf16", "bfloat16", 22),
        ("int8", "float32", 18),
        ("int8-fp16", "float16", 19),
    ],
)
def test_precision_is_in_the_graph(tmp_path: Path, precision: str, dtype: str, opset: int) -> None:
    """All layers have the type; the pixels, their normalization and the logits never do."""
    path = tmp_path / "model.onnx"
    export_onnx(network(3), identity((8, 8), 3), path, precision=PRECISIONS[precision])
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    types = layer_types(model)
    assert set(types.values()) == {dtype}
    assert len(types) == 8
    assert [entry.version for entry in model.opset_import] == [opset]
    ports = (*model.graph.input, *model.graph.output)
    kinds = [port.type.tensor_type.elem_type for port in ports]
    assert kinds == [onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT]
    constants = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert constants["normalize.mean"] == constants["normalize.std"] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("model", [network(3), Unusual()], ids=["usual", "unusual"])
def test_float16_computes_what_torch_does_in_float16(tmp_path: Path, model: nn.Module) -> None:
    data, precision = identity((9, 11), 3), PRECISIONS["fp16"]
    path = tmp_path / "model.onnx"
    export_onnx(model, data, path, precision=precision)
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 9, 11), dtype=np.uint8)
    expected = in_precision(model, data, precision).infer(images)
    with OrtEngine(path.read_bytes()) as engine:
        found = engine.infer(images)
    assert np.abs(found - expected).max() <= 5e-3 * np.abs(expected).max()
    assert next(model.parameters()).dtype is torch.float32


def test_bfloat16_of_an_unusual_network(tmp_path: Path) -> None:
    """Its convolution may not keep float32 weights that a batch norm was folded into."""
    path = tmp_path / "model.onnx"
    export_onnx(Unusual(), identity((8, 8), 3), path, precision=PRECISIONS["bf16"])
    assert set(layer_types(onnx.load(path)).values()) == {"bfloat16"}


@pytest.mark.parametrize(
    ("value", "message"), [(1e5, "1e+05, does not fit"), (np.nan, "not finite")]
)
@pytest.mark.parametrize(
    ("model", "layer"), [(network(3), "classifier"), (Unusual(), "conv")], ids=["usual", "unusual"]
)
def test_a_number_that_float16_does_not_hold_is_named(
    tmp_path: Path, model: nn.Module, layer: str, value: float, message: str
) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_parameter(f"{layer}.weight").view(-1)[3] = value
    with pytest.raises(GraphError) as raised:
        export_onnx(
            broken, identity((8, 8), 3), tmp_path / "model.onnx", precision=PRECISIONS["fp16"]
        )
    assert str(raised.value).startswith(f"model.onnx: {layer}.weight: ")
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_blocks_can_be_kept_in_float32(tmp_path: Path) -> None:
    data, path = identity((8, 8), 3), tmp_path / "model.onnx"
    kept = ("stages.1.0", "classifier")
    export_onnx(network(3), data, path, precision=PRECISIONS["fp16"], kept=kept)
    types = layer_types(onnx.load(path))
    wide = {name for name, found in types.items() if found == "float32"}
    assert wide == {"stages.1.0.conv1", "stages.1.0.conv2", "classifier"}
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    expected = Deployed(network(3), data).infer(images)
    with OrtEngine(path.read_bytes()) as engine:
        assert np.abs(engine.infer(images) - expected).max() <= 5e-3 * np.abs(expected).max()


def test_blocks_of_an_unusual_network_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="conv cannot be kept in float32"):
        export_onnx(
            Unusual(),
            identity((8, 8), 3),
            tmp_path / "model.onnx",
            precision=PRECISIONS["fp16"],
            kept=("conv",),
        )


def test_a_network_that_cannot_be_exported_is_one_clear_error(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2] if x.sum() > 0 else x.flatten(1)[:, 2:4]

    with pytest.raises(GraphError, match=r"odd\.onnx: .* cannot be exported") as error:
        export_onnx(Odd(), identity((8, 8), 2), tmp_path / "odd.onnx")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_other_classes_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"model.onnx: .* shape \[1, 4\] .* 3 classes"):
        export_onnx(network(4), identity((8, 8), 3), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
