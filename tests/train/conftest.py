from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from eps_train.data.downloads import import_torchvision


@pytest.fixture(scope="session")
def torchvision_models() -> None:
    """Skips where torchvision is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs the package torchvision")
    import_torchvision()


@pytest.fixture(scope="session")
def timm_models(torchvision_models: None) -> None:
    """Skips where timm is not installed (it imports torchvision)."""
    pytest.importorskip("timm")


OWN = '''
import torch
from torch import nn


class Net(nn.Module):
    """A residual network of two blocks."""

    def __init__(self, num_classes, in_channels=1, width=4):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.two = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.one(x).relu()
        x = x + self.two(x).relu()
        return self.head(x.mean((2, 3)))


def keywords(*, n_classes, **rest):
    assert not rest
    return Net(n_classes)


def fixed():
    return Net(10)


def demanding(num_classes, depth):
    return Net(num_classes)


def nothing(num_classes):
    return num_classes


def broken(num_classes):
    raise RuntimeError("two\\nlines")


def ten(num_classes):
    return Net(10)


def several(num_classes, in_chans):
    class Several(Net):
        def forward(self, x):
            return super().forward(x), x

    return Several(num_classes, in_chans)


def plain(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


def counting(num_classes):
    """Computes with its tensors while it is made."""
    net = Net(num_classes)
    net.scale = float(net.stem.weight.abs().sum()) * 0 + 1
    net.register_buffer("beside", torch.full((1,), 0.5), persistent=False)
    return net
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of somebody's own, importable in this test."""
    (tmp_path / "somebodys.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "somebodys", raising=False)
    return "somebodys"
