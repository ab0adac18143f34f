"""Small checkpoints made without training: random weights, chosen dead blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from eps_train import recipes
from eps_train.data import dataset
from eps_train.models.spec import NetworkSpec
from eps_train.training.checkpoint import Checkpoint, GateRecord, PruneRecord

EPSILON = 2.5


def make_checkpoint(
    *, dead: Sequence[str] = (), depth: int = 20, width: int = 4, gated: bool = True, seed: int = 0
) -> Checkpoint:
    """A checkpoint on digits whose named blocks are recorded as dead; or a plain one."""
    digits = dataset.load("digits")
    torch.manual_seed(seed)
    spec = NetworkSpec.parse(f"cifar:{depth}x{width}", in_channels=1, classes=10)
    if not gated:
        spec = NetworkSpec(family=spec.family, arguments=spec.arguments)
    model = spec.build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    samples = digits.identity.sizes["validation"]
    records = [
        GateRecord(
            block=block,
            epsilon=EPSILON,
            steps=20,
            closed_steps=20 if block in dead else 3,
            peak=1.25 if block in dead else 7.5,
            death=PruneRecord(
                epoch=9, epsilon=EPSILON, steps=60, peak=1.25, heldout_peak=1.0, samples=samples
            )
            if block in dead
            else None,
        )
        for block in spec.gated
    ]
    return Checkpoint(
        network=spec,
        state=dict(model.state_dict()),
        gates=records,
        data=digits.identity,
        config=replace(recipes.digits(), model=f"cifar:{depth}x{width}", seed=seed).to_dict(),
        metrics={"epoch": 10, "validation": {"accuracy": 0.1, "loss": 2.3}, "test": None},
    )
