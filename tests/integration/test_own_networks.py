"""A network that is none of ours, from training to a compact network, by the commands alone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

import eps_compact
from eps_compact.cli import main as compact_main
from eps_deploy.cli.deploy import main as deploy_main
from eps_deploy.cli.verify import main as verify_main
from eps_train.cli import main as train_main
from eps_train.gating import rewriting
from eps_train.training.checkpoint import Checkpoint, PruneRecord
from tests.commands import run

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
ANYTHING_GOES = ("--min-speedup", "0", "--max-accuracy-drop", "100", "--time-budget", "0.2")
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


NOTEBOOK = """
import sklearn.datasets, torch
from torch import nn
from torch.nn import functional as F
import eps_train


class Block(nn.Module):
    def __init__(self, width, drop):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.scale, self.drop = nn.Parameter(torch.tensor(1.0)), drop

    def forward(self, x):
        branch = F.dropout(self.norm(self.conv(x)), self.drop, self.training)
        return torch.relu(x + self.scale * branch)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(4, 0.1) for _ in range(3)))
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Shut(eps_train.BlockPruner):
    def thresholds(self, epoch):
        return {block: 1e9 if block == "blocks.1" else 0.0 for block in self.gates}


torch.manual_seed(0)
images = torch.from_numpy(sklearn.datasets.load_digits().images[:64, None] / 16).float()
labels = torch.from_numpy(sklearn.datasets.load_digits().target[:64])
pruner = Shut(Net(), example=images[:1], epsilon=1.0, mean=0.3, std=0.3)
optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.1)
for _ in range(2):
    F.cross_entropy(pruner.model(images), labels).backward()
    optimizer.step()
    pruner.step()
    pruner.end_epoch([(images, labels)], optimizer=optimizer)
pruner.save("ckpt.pt", data="digits")
torch.save(pruner.model.eval()(images), "logits.pt")
"""


def test_a_network_of_a_notebook_needs_none_of_its_code_again(tmp_path: Path) -> None:
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, check=True)
    (tmp_path / "notebook.py").unlink()
    for name, main, *args in (
        ("eps-compact", compact_main, "ckpt.pt"),
        ("eps-verify", verify_main, "compact.pt"),
        ("eps-deploy", deploy_main, "--engine", "ort", *ANYTHING_GOES),
        ("eps-verify", verify_main, "bundle"),
    ):
        done = run(name, main, *args, cwd=tmp_path)
        assert done.code == 0, done.stderr
    checkpoint = Checkpoint.load(tmp_path / "ckpt.pt")
    assert (checkpoint.network.family, checkpoint.dead) == ("graph", ("blocks.1",))
    images = torch.from_numpy(load_digits().images[:64, None] / 16).float()
    plain = eps_compact.load(tmp_path / "compact.pt")
    logits = plain((images - 0.3) / 0.3)
    assert torch.isfinite(logits).all()
