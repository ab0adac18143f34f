"""What `eps-train` and `eps-verify` say about networks of users, before they could go wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import eps_compact
from eps_compact.cli import main as compact_main
from eps_core.errors import FileFormatError
from eps_deploy.cli.verify import main as verify_main
from eps_train.cli import main as train_main
from tests.commands import Result, run

SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + F.gelu(self.conv(x))


class Quiet(Block):
    def forward(self, x):
        with torch.no_grad():
            return x + self.conv(x)


class Pooled(Block):
    def forward(self, x):
        return x.mean((2, 3), keepdim=True) + self.conv(x)


class Lone(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x)


class Scaled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + self.layer(x)


class Net(nn.Module):
    def __init__(self, classes, *blocks, pixels=None):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(1, 8, 3, padding=1), nn.Sequential(*blocks)
        self.pixels, self.head = pixels, nn.Linear(8 * (pixels or 1), classes)

    def features(self, x):
        return self.blocks(self.stem(x))

    def forward(self, x):
        x = self.features(x)
        return self.head(x.flatten(1) if self.pixels else x.mean((2, 3)))


class Pair(Net):
    def forward(self, x, y):
        return super().forward(x) + super().forward(y)


class Maps(Net):
    def forward(self, x):
        return self.features(x)


class Scripted(Net):
    def forward(self, x):
        x = self.features(x)
        self.calls = getattr(self, "calls", 0) + 1
        return self.head(x.mean((2, 3))) * self.calls


def good(num_classes):
    return Net(num_classes, Block(), Block())


def pair(num_classes):
    return Pair(num_classes, Block(), Block())


def maps(num_classes):
    return Maps(num_classes, Block())


def fixed(num_classes):
    return Net(num_classes, Block(), pixels=1024)


def calls(num_classes):
    return Scripted(num_classes, Block())


def mixed(num_classes):
    return Net(num_classes, Block(), Quiet(), Pooled(), Block())


def apart(num_classes):
    return Net(num_classes, *(Lone() for _ in range(6)))


def shared(num_classes):
    layer = nn.Conv2d(8, 8, 3, padding=1)
    return Net(num_classes, Scaled(layer), Scaled(layer))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def plan(folder: Path, model: str, *args: object) -> Result:
    return run("eps-train", train_main, "--model", model, "--dry-run", *args, cwd=folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pair", "missing 1 required positional argument: 'y'"),
        ("fixed", "mat1 and mat2 shapes cannot be multiplied"),
        ("maps", "returns 2x8x8x8 for 2 images of 1x8x8, not logits of 2x10"),
        ("calls", "output 0 differs"),
    ],
)
def test_what_cannot_be_trained_as_it_is_written_is_refused(
    folder: Path, name: str, reason: str
) -> None:
    refused = plan(folder, f"mine:{name}")
    assert refused.code == 1
    assert refused.error.startswith(f"eps-train: error: --model mine:{name}: ")
    assert reason in refused.error
    assert len(refused.stderr.strip().splitlines()) == 1


def test_what_gets_no_gate_is_listed(folder: Path) -> None:
    planned = plan(folder, "mine:mixed")
    assert planned.code == 0, planned.stderr
    text = " ".join(planned.stderr.split())
    assert "2 blocks" in text
    assert "not gated: blocks.1: kept whole, for it switches gradients off or on" in text
    assert "not gated: blocks.2: its shortcut is broadcast over the sum" in text
    trained = run(*("eps-train", train_main, "--model", "mine:mixed", "--epochs", "1"), cwd=folder)
    assert trained.code == 0, trained.stderr
    assert "not gated: blocks.1" in trained.stderr


def test_blocks_in_modules_of_their_own_are_one_stage(folder: Path) -> None:
    planned = plan(folder, "mine:apart", "--target-parameters", "0.4")
    assert planned.code == 0, planned.stderr
    assert "cannot be reached" not in planned.stderr


def test_a_target_below_what_every_stage_keeps_is_said_before_training(folder: Path) -> None:
    planned = plan(folder, "mine:good", "--target-parameters", "0.2")
    assert planned.code == 0, planned.stderr
    text = " ".join(planned.stderr.split())
    assert "--target-parameters 0.2 cannot be reached: every stage keeps a block" in text


def test_blocks_that_free_nothing_are_said_before_training(folder: Path) -> None:
    planned = plan(folder, "mine:shared")
    assert planned.code == 0, planned.stderr
    text = " ".join(planned.stderr.split())
    assert "no block of this network frees a parameter when it is removed" in text


def test_networks_of_timm_with_arguments(folder: Path) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs the package timm")
    vit = "timm:vit_tiny_patch16_224"
    small = "depth=2,embed_dim=24,num_heads=3,patch_size=4"
    refused = plan(folder, vit)
    assert refused.code == 1
    assert "does not run on a batch of images of 1x8x8" in refused.error
    planned = plan(folder, f"{vit},img_size=8,{small}")
    assert planned.code == 0, planned.stderr
    assert "4 blocks" in " ".join(planned.stderr.split())
    for wrong in ("checkpoint_path=x", "pretrained=true", "in_chans=3", "img_size"):
        refused = plan(folder, f"{vit},{wrong}")
        assert refused.code == 1
        assert f"{wrong} is not a permitted argument" in refused.error


def test_an_edited_network_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--model", "mine:good", "--epochs", "1")
    trained = run("eps-train", train_main, *options, cwd=folder)
    assert trained.code == 0, trained.stderr
    assert run("eps-compact", compact_main, "ckpt.pt", cwd=folder).code == 0
    assert run("eps-verify", verify_main, "compact.pt", cwd=folder).code == 0
    eps_compact.load(folder / "compact.pt")
    (folder / "mine.py").write_text(SOURCE.replace("F.gelu", "F.relu"))
    monkeypatch.delitem(sys.modules, "mine")
    importlib.invalidate_caches()
    verified = run("eps-verify", verify_main, "compact.pt", cwd=folder)
    assert verified.code == 3
    assert "the code of its network is not the code that was compacted" in " ".join(
        (verified.stdout + verified.stderr).split()
    )
    with pytest.raises(FileFormatError, match="is not the code that was compacted"):
        eps_compact.load(folder / "compact.pt")
