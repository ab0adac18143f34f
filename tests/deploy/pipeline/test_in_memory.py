"""A bundle from a notebook: no file before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import eps_compact
import eps_deploy
from eps_compact import Compaction
from eps_core.errors import ConfigError, DataError, GraphError
from eps_deploy.cli.predict import main as predict
from eps_deploy.cli.verify import main as verify
from tests.commands import run
from tests.train.loops import EXAMPLE, HELDOUT, batches, own_net, pruned


@pytest.fixture(scope="module")
def compaction() -> Compaction:
    return eps_compact.compact_pruner(pruned(fit="letterbox"), HELDOUT)


def test_a_bundle_that_is_verified_and_answers(compaction: Compaction, tmp_path: Path) -> None:
    steps: list[str] = []
    report = eps_deploy.deploy(
        compaction,
        iter(HELDOUT),
        output=tmp_path / "bundle",
        log=steps.append,
        min_speedup=0.0,
        time_budget=0.3,
    )
    assert report["passed"], report["checks"]
    assert report["accuracy"]["samples"] == 16
    assert any("exported" in step for step in steps)
    bundle = eps_deploy.load_bundle(tmp_path / "bundle")
    assert list(bundle.manifest["labels"]) == list("abcdefghij")
    assert bundle.preprocessing.fit == bundle.manifest["preprocessing"]["fit"] == "letterbox"
    assert not (tmp_path / "bundle" / "reproduce.sh").exists(), "there is nothing to make it from"
    stored = np.load(tmp_path / "bundle" / "samples.npz")
    pixels = torch.from_numpy(stored["images"]) / 255
    logits = compaction.build()(pixels).detach().numpy()
    assert np.allclose(stored["logits"], logits, atol=1e-5)
    checked = run("eps-verify", verify, "bundle", cwd=tmp_path)
    assert checked.code == 0, checked.stderr
    example = next((tmp_path / "bundle" / "examples").iterdir())
    answered = run("eps-predict", predict, "bundle", example, cwd=tmp_path)
    assert answered.code == 0, answered.stderr


def test_int8_beside_a_trained_baseline(compaction: Compaction, tmp_path: Path) -> None:
    baseline = own_net(seed=1).train()
    before = {name: tensor.clone() for name, tensor in baseline.state_dict().items()}
    calibration = iter(batches(14, seed=3))
    report = eps_deploy.deploy(
        compaction,
        HELDOUT,
        precision="int8",
        calibration=calibration,
        calibration_samples=100,
        baseline=baseline,
        output=tmp_path / "bundle",
        max_accuracy_drop=100.0,
        max_class_drop=100.0,
        min_speedup=0.0,
        time_budget=0.1,
        max_batch=2,
        opt_batch=1,
    )
    assert report["precision"]["name"] == "int8"
    assert report["precision"]["calibration"]["samples"] == 100
    assert len(list(calibration)) == 1, "no more batches are read than are needed"
    assert report["latency_baseline"] == "trained plain network"
    assert "accuracy against a trained baseline" not in [e["what"] for e in report["not_run"]]
    images = torch.cat([images for images, _ in HELDOUT])
    labels = torch.cat([labels for _, labels in HELDOUT])
    with torch.no_grad():
        right = (own_net(seed=1).eval()(images).argmax(1) == labels).float().mean().item()
    assert report["accuracy"]["baseline"] == pytest.approx(right)
    assert {entry["name"] for entry in report["checks"]} >= {"accuracy", "class-accuracy"}
    assert max(entry["batch"] for entry in report["latency"]) == 2
    assert baseline.training
    assert all(torch.equal(t, before[name]) for name, t in baseline.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int4"}, "precision='int4': give fp32, tf32, fp16, bf16, int8, int8-fp16"),
        ({"precision": "int8"}, r"deploy\(precision='int8'\): give calibration=, batches of"),
        ({"calibration": HELDOUT}, r"deploy\(calibration=\): only applies to int8"),
        (
            {"precision": "int8", "calibration": HELDOUT},
            "calibration: 16 images: too few to calibrate int8",
        ),
        (
            {"precision": "int8", "calibration": [EXAMPLE - 1]},
            "calibration: its pixels are -1.00 to 0.00, not 0 to 1",
        ),
        ({"baseline": nn.Flatten()}, r"deploy\(baseline=\): returns 2x64 for 2 images, not"),
        ({"baseline": nn.Linear(3, 10)}, r"deploy\(baseline=\): does not run on images of 1x8x8"),
        ({"max_class_drop": 1.0}, "--max-class-drop: there is no trained baseline"),
        ({"data_root": "data"}, r"deploy\(data_root=\): only applies to eps-deploy"),
        ({"precision": "bf16"}, "--bf16: ONNX Runtime has no bfloat16 convolutions"),
        ({"colour": "red"}, r"deploy\(\): .*'colour'"),
        ({"heldout": []}, "heldout: yields no batch"),
        ({"heldout": [EXAMPLE]}, r"heldout: has no labels; yield \(images, labels\)"),
    ],
)
def test_what_cannot_be_deployed(
    compaction: Compaction, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    settings = {"heldout": HELDOUT, "output": tmp_path / "bundle", **arguments}
    with pytest.raises((ConfigError, DataError, GraphError), match=message):
        eps_deploy.deploy(compaction, **settings)
    assert not list(tmp_path.iterdir())
