"""The exported graph: sound, truly dynamic, quiet, repeatable, and equal to torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from eps_deploy.engines.ort import OrtEngine
from eps_deploy.export import Deployed, export_onnx
from eps_train import data, graph
from eps_train.data import DataIdentity
from eps_train.errors import GraphError
from eps_train.network import NetworkSpec
from eps_train.preprocess import Preprocessing


def identity(shape: tuple[int, int], classes: int) -> DataIdentity:
    return replace(
        data.load("digits").identity,
        classes=tuple(f"class {index}" for index in range(classes)),
        mean=(120.0, 110.0, 100.0),
        std=(60.0, 61.0, 62.0),
        preprocessing=Preprocessing(resize=shape, crop=shape, color="rgb"),
    )


def network(classes: int) -> nn.Module:
    torch.manual_seed(0)
    spec = NetworkSpec.parse("cifar:8x4", in_channels=3, classes=classes)
    return graph.drop_taps(graph.drop_gates(spec.build()))


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


def test_node_names_are_plain(exported: Path) -> None:
    names = [node.name for node in onnx.load(exported).graph.node]
    assert names[0] == "0000_Cast"
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


def test_a_network_that_cannot_be_exported_is_one_clear_error(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2] if x.sum() > 0 else x.flatten(1)[:, 2:4]

    with pytest.raises(GraphError, match=r"odd\.onnx: .* cannot be exported") as error:
        export_onnx(Odd(), identity((8, 8), 2), tmp_path / "odd.onnx")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="has the shapes"):
        export_onnx(network(4), identity((8, 8), 3), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
