"""What a network costs: parameters and floating-point operations."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, slots=True)
class Cost:
    """Learned parameters, and FLOPs of one forward pass of one image.

    A multiply-add counts as two FLOPs. Convolutions and linear layers are counted, as is usual;
    normalisation, activations and additions are not.
    """

    parameters: int
    flops: int


def cost(model: nn.Module, input_shape: tuple[int, int, int]) -> Cost:
    """Count `model` for one float32 image of `input_shape` `[C, H, W]`; nothing is computed."""
    skeleton = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        skeleton(torch.empty((1, *input_shape), device="meta"))
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops())
