"""A bundle from a notebook: no file before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eps_compact
import eps_deploy
from eps_compact import Compaction
from eps_core.errors import ConfigError, DataError
from eps_deploy.cli.predict import main as predict
from eps_deploy.cli.verify import main as verify
from tests.commands import run
from tests.train.loops import EXAMPLE, HELDOUT, SHUT, SubsetPruner, own_net, sgd, train_epoch


@pytest.fixture(scope="module")
def compaction() -> Compaction:
    classes = list("abcdefghij")
    made = SubsetPruner(own_net(), example=EXAMPLE, epsilon=SHUT, classes=classes, fit="letterbox")
    optimizer = sgd(made)
    for _ in range(2):
        train_epoch(made, optimizer)
        made.end_epoch(HELDOUT, optimizer=optimizer)
    return eps_compact.compact_pruner(made, HELDOUT)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int8"}, "precision='int8': give fp32, tf32, fp16 or bf16"),
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
    with pytest.raises((ConfigError, DataError), match=message):
        eps_deploy.deploy(compaction, **settings)
    assert not list(tmp_path.iterdir())
