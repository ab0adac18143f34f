"""SGD over a network whose parameters may leave while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from eps_train.config import TrainingConfig

Named = Iterable[tuple[str, nn.Parameter]]


def make_sgd(named: Named, config: TrainingConfig) -> torch.optim.SGD:
    """SGD that decays the weights of convolutions and linear layers and nothing else (paper).

    All other parameters (biases, scales of norms, a branch's scale without dimensions) are trained
    without decay; each of `named` is in one of the two groups.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for _, parameter in named:
        (decayed if parameter.dim() > 1 else others).append(parameter)
    optimizer = torch.optim.SGD(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.lr_schedule[0][1],
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )
    for parameter in (*decayed, *others):
        # The fused kernel leaves its buffers unset when the first step of all is one that the loss
        # scale of fp16 leaves out. From zero, the first step is the same.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_rate(optimizer: torch.optim.SGD, rate: float) -> None:
    """Set the learning rate of all parameters, in place where it is a tensor.

    In float32, which a tensor has to be on a GPU: so both give the same weights.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = torch.tensor(rate, dtype=torch.float32).item()


def keep_only(optimizer: torch.optim.SGD, named: Named) -> None:
    """Forget every parameter that is not among `named`, and its momentum."""
    kept = {id(parameter) for _, parameter in named}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in kept:
                optimizer.state.pop(parameter, None)
        group["params"] = [p for p in group["params"] if id(p) in kept]


def momentum(optimizer: torch.optim.SGD, named: Named) -> dict[str, Tensor]:
    """Momentum by parameter name."""
    return {name: optimizer.state[parameter]["momentum_buffer"].cpu() for name, parameter in named}


def restore_momentum(optimizer: torch.optim.SGD, named: Named, saved: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`momentum`."""
    for name, parameter in named:
        optimizer.state[parameter]["momentum_buffer"].copy_(saved[name])
