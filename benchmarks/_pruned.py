"""A deep network and its compact form for deployment benchmarks: untrained, dead blocks chosen.

Neither time nor size depends on the weights.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from _steps import random_images
from torch import nn

from eps_deploy.export.export import Deployed
from eps_train.data.dataset import DataIdentity
from eps_train.gating import folding, rewriting
from eps_train.models.spec import NetworkSpec, cost
from eps_train.recipes import cifar


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Baseline and compact network, as `eps-deploy` exports them; input is uint8 `[N, 3, 32, 32]`.

    Attributes:
        full: the baseline, with all blocks.
        compact: without the dead blocks, batch norms folded.
        flops: per image, of `full` and `compact`.
    """

    full: Deployed
    compact: Deployed
    flops: dict[str, int]

    @property
    def identity(self) -> DataIdentity:
        return self.full.identity


def pair(depth: int, dead: int) -> Pair:
    """Build a network of the CIFAR family and its compact form without some blocks."""
    torch.manual_seed(0)
    spec = NetworkSpec.parse(f"cifar:{depth}x16", in_channels=3, classes=10)
    gated = spec.build()
    for module in gated.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    gated.eval()
    doomed = random.Random(0).sample(spec.gated, dead)
    full = rewriting.drop_taps(rewriting.drop_gates(gated)).eval()
    rest = rewriting.drop_taps(rewriting.drop_gates(rewriting.remove_blocks(gated, doomed))).eval()
    compact, _ = folding.fold(rest)
    identity = random_images(cifar("cifar10-110", dataset="cifar10", depth=depth), 64).identity
    shape = identity.input_shape
    return Pair(
        full=Deployed(full, identity),
        compact=Deployed(compact, identity),
        flops={"full": cost(full, shape).flops, "compact": cost(compact, shape).flops},
    )
