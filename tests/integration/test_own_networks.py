"""A network that is none of ours, from training to a compact network, by the commands alone."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eps_compact
from eps_compact.cli import main as compact_main
from eps_train.cli import main as train_main
from eps_train.gating import rewriting
from eps_train.training.checkpoint import Checkpoint, PruneRecord
from tests.commands import run

pytestmark = pytest.mark.usefixtures("undrawn")

OWN = """
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.norm(self.conv(x))
        out += x
        return self.relu(out)


def network(num_classes, in_channels=3):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), Block(8), Block(8), Block(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""
SHORT = ("--epochs", "1", "--batch-size", "256", "--epsilon", "0.001")


def bury(path: Path, block: str) -> None:
    """Have a short run's checkpoint say that a block died."""
    checkpoint = Checkpoint.load(path)
    death = PruneRecord(epoch=1, epsilon=2.5, steps=5, peak=1.0, heldout_peak=1.0, samples=143)
    checkpoint.gates = [
        replace(record, death=death) if record.block == block else record
        for record in checkpoint.gates
    ]
    checkpoint.save(path)


@pytest.mark.parametrize("model", ["theirs:network", "timm:resnet10t", "imagenet:18x2"])
def test_train_resume_and_compact(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model.startswith("timm") and importlib.util.find_spec("timm") is None:
        pytest.skip("needs the package timm")
    (tmp_path / "theirs.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    trained = run("eps-train", train_main, "--model", model, *SHORT, cwd=tmp_path)
    assert trained.code == 0, trained.stderr
    again = run("eps-train", train_main, "--model", model, *SHORT, "--resume", cwd=tmp_path)
    assert again.code == 0, again.stderr
    checkpoint = Checkpoint.load(tmp_path / "ckpt.pt")
    block = checkpoint.network.gated[-1]
    bury(tmp_path / "ckpt.pt", block)
    compacted = run("eps-compact", compact_main, "ckpt.pt", "--no-fold", cwd=tmp_path)
    assert compacted.code == 0, compacted.stderr
    plain = eps_compact.load(tmp_path / "compact.pt")
    gated = checkpoint.build_gated().eval()
    rewriting.gates(gated)[block].latch()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(plain(x), gated(x))
    assert len(plain.state_dict()) < len(checkpoint.state)


def test_weights_to_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--model", "cifar:8x4", *SHORT)
    first = run("eps-train", train_main, *options, "--output", "first", cwd=tmp_path)
    assert first.code == 0, first.stderr
    weights = ("--weights", "first/ckpt.pt")
    second = run("eps-train", train_main, *options, *weights, "--output", "second", cwd=tmp_path)
    assert second.code == 0, second.stderr
    assert "starting from first/ckpt.pt" in second.stderr
    states = [Checkpoint.load(tmp_path / n / "ckpt.pt").state for n in ("first", "second")]
    name = "stages.0.0.conv1.weight"
    assert not torch.equal(states[0][name], states[1][name])
    other = ("--model", "cifar:14x4", *SHORT, *weights, "--output", "third")
    refused = run("eps-train", train_main, *other, cwd=tmp_path)
    assert refused.code == 1
    assert "--weights first/ckpt.pt: not of this network" in refused.error
    assert not (tmp_path / "third" / "ckpt.pt").exists()


def test_refusals_are_one_line(tmp_path: Path) -> None:
    for model, reason in {
        "nowhere:net": "no module named nowhere",
        "os:abort": "is part of Python and has no networks",
        "cifar": "not a model",
    }.items():
        refused = run("eps-train", train_main, "--model", model, cwd=tmp_path)
        assert refused.code == 1
        assert refused.error.startswith(f"eps-train: error: --model {model}: ")
        assert reason in refused.error
        assert "Traceback" not in refused.stderr
