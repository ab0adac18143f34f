"""A network's numbers in a smaller type, with a word when they do not fit."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn

from eps_compact import folding
from eps_train import graph
from eps_train.errors import GraphError


def narrow(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` on the CPU as `dtype`, contiguous and detached; integers stay what they are.

    Raises GraphError that names the tensor when a number in it is not finite in `dtype`.
    """
    value = tensor.detach().cpu().contiguous()
    if not value.is_floating_point():
        return value
    cast = value.to(dtype)
    if cast.isfinite().all():
        return cast
    if not value.isfinite().all():
        raise GraphError(
            f"{name}: holds a number that is not finite; train again from an earlier checkpoint"
        )
    raise GraphError(
        f"{name}: its largest number, {value.abs().max().item():.4g}, does not fit in"
        f" {str(dtype).removeprefix('torch.')} (at most {torch.finfo(dtype).max:.5g});"
        " use --bf16 or --fp32"
    )


def narrowed(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `network` in evaluation mode whose parameters and buffers are of type `dtype`.

    Batch norms are folded first where they can be, in float32: then they are rounded once, and
    torch's exporter leaves no float32 weight behind. Raises GraphError as `narrow` does.
    """
    copied = copy.deepcopy(network).eval()
    with contextlib.suppress(GraphError):  # what cannot be traced is not folded
        copied, _ = folding.fold(graph.trace(copied, one_mode=True))
    for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
        narrow(name, tensor, dtype)
    return copied.to(dtype)
