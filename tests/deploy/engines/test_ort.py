"""ONNX Runtime as an engine: what it answers, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from eps_deploy.engines.base import Engine, EngineError
from eps_deploy.engines.ort import OrtEngine
from eps_train.errors import DataError


def tiny_model(
    *, dtype: int = TensorProto.UINT8, name: str = "images", height: int | str = 2
) -> bytes:
    """Pixel sums by channel, as an ONNX model with the bundle's inputs and outputs."""
    nodes = [
        helper.make_node("Cast", [name], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["float", "axes"], ["logits"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, dtype, ["N", 3, height, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("batch", [1, 5, 256])
def test_infer(batch: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (batch, 3, 2, 2), dtype=np.uint8)
    engine: Engine
    with OrtEngine(tiny_model()) as engine:
        logits = engine.infer(images)
    assert logits.dtype == np.float32
    assert logits.tolist() == images.sum(axis=(2, 3)).tolist()


def test_a_strided_view_is_as_good_as_a_copy() -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 2, 2, 3), dtype=np.uint8)
    view = images.transpose(0, 3, 1, 2)[::2]
    with OrtEngine(tiny_model()) as engine:
        assert (engine.infer(view) == engine.infer(np.ascontiguousarray(view))).all()


def test_signature_and_description() -> None:
    with OrtEngine(tiny_model(), threads=2) as engine:
        assert (engine.input_shape, engine.classes, engine.max_batch) == ((3, 2, 2), 3, 256)
        told = engine.describe()
    assert (told["name"], told["provider"], told["threads"]) == ("ort", "CPUExecutionProvider", 2)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (np.zeros((1, 3, 2, 2), np.float32), "uint8"),
        (np.zeros((1, 3, 2, 2), np.int8), "uint8"),
        ([[1, 2]], "uint8"),
        (np.zeros((3, 2, 2), np.uint8), r"\[N, 3, 2, 2\], not \[3, 2, 2\]"),
        (np.zeros((1, 3, 2, 4), np.uint8), r"\[N, 3, 2, 2\], not \[1, 3, 2, 4\]"),
        (np.zeros((0, 3, 2, 2), np.uint8), "1 to 256 images, not 0"),
        (np.zeros((257, 3, 2, 2), np.uint8), "1 to 256 images, not 257"),
    ],
)
def test_images_that_do_not_fit_are_refused(images: Any, told: str) -> None:
    with OrtEngine(tiny_model()) as engine, pytest.raises(DataError, match=told) as refusal:
        engine.infer(images)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"not onnx", tiny_model()[:50]])
def test_what_is_no_model_is_refused(content: bytes) -> None:
    with pytest.raises(EngineError, match=r"some\.onnx: ONNX Runtime cannot load it"):
        OrtEngine(content, name="some.onnx")


@pytest.mark.parametrize(
    "foreign",
    [tiny_model(name="pixels"), tiny_model(dtype=TensorProto.FLOAT)],
    ids=["other input", "other type"],
)
def test_a_stranger_s_model_is_refused(foreign: bytes) -> None:
    with pytest.raises(EngineError, match="not a network exported by eps-deploy"):
        OrtEngine(foreign)


def test_image_size_must_be_fixed() -> None:
    with pytest.raises(EngineError, match="must be fixed"):
        OrtEngine(tiny_model(height="H"))


def test_the_provider_that_really_runs_is_asserted(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime falls back in silence when a provider cannot be had."""
    monkeypatch.setattr("eps_deploy.engines.ort.PROVIDER", "CUDAExecutionProvider")
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(EngineError, match="not on CUDAExecutionProvider"),
    ):
        OrtEngine(tiny_model())


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    with OrtEngine(tiny_model()) as engine:
        pass
    with pytest.raises(EngineError, match="closed"):
        engine.infer(np.zeros((1, 3, 2, 2), np.uint8))
