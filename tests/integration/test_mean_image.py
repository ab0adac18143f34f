"""A network that was trained with a mean image, through compaction and export to ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from eps_compact.artifact import CompactArtifact
from eps_compact.cli import main as compact
from eps_deploy.engines.ort import OrtEngine
from eps_deploy.export.export import export_onnx
from eps_train.data import dataset
from eps_train.models.resnets import Normalize
from eps_train.training.evaluate import logits
from tests import commands
from tests.checkpoints import make_checkpoint


def test_it_ships_inside_the_network(tmp_path: Path) -> None:
    made = dataset.load("digits", normalization="pixel")
    checkpoint = make_checkpoint(dead=("stages.2.0",), depth=8)
    checkpoint.data = made.identity
    checkpoint.save(tmp_path / "ckpt.pt")
    result = commands.run("eps-compact", compact, "ckpt.pt", cwd=tmp_path)
    assert result.code == 0, result.stderr
    artifact = CompactArtifact.load(tmp_path / "compact.pt")
    assert artifact.data == made.identity
    export_onnx(artifact.build(), artifact.data, tmp_path / "model.onnx")
    images = made.test.images[:50]
    normalize = Normalize.of(made.identity)
    expected = logits(checkpoint.build_gated(), normalize, images).numpy()
    with OrtEngine((tmp_path / "model.onnx").read_bytes(), name="model.onnx") as engine:
        found = engine.infer(images.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
