"""Small gated networks with random weights."""

from __future__ import annotations

import torch
from torch import fx

from eps_train.gating import rewriting
from eps_train.models.resnets import CifarResNet


def gated(*, seed: int = 0, depth: int = 20, width: int = 2, classes: int = 4) -> fx.GraphModule:
    """One of the CIFAR family for 8x8 images with its gates open."""
    torch.manual_seed(seed)
    return rewriting.trace(CifarResNet(depth=depth, width=width, classes=classes))
