"""Types of layers: in the file, and as ONNX Runtime really computes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from eps_core.errors import GraphError
from eps_deploy.export.export import export_onnx
from eps_deploy.export.types import executed_types, layer_types
from eps_deploy.precision import PRECISIONS, belongs, check_layer_types
from tests.deploy.export.test_export import identity, network


def exported(folder: Path, precision: str) -> bytes:
    path = folder / "model.onnx"
    export_onnx(network(3), identity((8, 8), 3), path, precision=PRECISIONS[precision])
    return path.read_bytes()


def test_float16_is_executed_as_float32_with_casts(tmp_path: Path) -> None:
    model = exported(tmp_path, "fp16")
    assert set(layer_types(onnx.load_from_string(model)).values()) == {"float16"}
    assert executed_types(model) == {"float32": 8}


def test_every_layer_is_counted_once(tmp_path: Path) -> None:
    """ONNX Runtime makes convolutions of batch norms too; they are no layers of the network."""
    assert executed_types(exported(tmp_path, "fp32")) == {"float32": 8}


def test_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = exported(tmp_path, "fp32")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    executed_types(model)
    assert list(scratch.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_layer_of_another_type_is_named(tmp_path: Path) -> None:
    types = layer_types(onnx.load_from_string(exported(tmp_path, "fp32")))
    check_layer_types(types, PRECISIONS["fp32"])
    check_layer_types(types, PRECISIONS["tf32"])
    with pytest.raises(GraphError, match=r"layer stem\.0 computes in float32, not in float16: "):
        check_layer_types(types, PRECISIONS["fp16"])
    with pytest.raises(GraphError, match=r"none of the 8 .* takes int8"):
        check_layer_types(types, PRECISIONS["int8"])


def test_a_weight_of_another_type_than_the_input_is_seen(tmp_path: Path) -> None:
    """As in a bfloat16 network whose exporter folded batch norms into float32 weights."""
    model = onnx.load_from_string(exported(tmp_path, "bf16"))
    weight = next(t for t in model.graph.initializer if t.name == "stem.0.weight")
    weight.data_type = TensorProto.FLOAT
    types = layer_types(model)
    assert types["stem.0"] == "bfloat16 and float32"
    assert types["stages.0.0.conv1"] == "bfloat16"


def test_a_layer_belongs_only_to_its_own_block() -> None:
    assert belongs("stages.1.conv", ["stages.1"])
    assert belongs("stages.1", ["stages.1"])
    assert not belongs("stages.10.conv", ["stages.1"])
