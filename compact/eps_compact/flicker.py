"""What it changes that a live gate ships as a plain addition.

In training a gate judges a whole batch, so that an answer depends on its neighbours; what is served
must not. Compared is the plain addition with the same gate judging each image by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eps_train import graph
from eps_train.evaluate import logits
from eps_train.images import Part


@dataclass(frozen=True, kw_only=True, slots=True)
class Flicker:
    """Plain additions against gates that judge each image by itself, on held-out images.

    Attributes:
        blocks: those whose gates were closed on steps of the last epoch, in the order of
            computation.
        samples: images.
        differ: share of the images on which at least one gate shut (0..1).
        top1_differ: share of the images that are then named otherwise.
        accuracy: top-1 (0..1) of both, `addition` and `gate`; None where labels are not known.
    """

    blocks: tuple[str, ...]
    samples: int
    differ: float
    top1_differ: float
    accuracy: dict[str, float] | None


def flicker(
    model: nn.Module,
    normalize: nn.Module,
    images: Tensor | Part,
    thresholds: Mapping[str, float],
    answers: Tensor,
    labels: Tensor | None,
) -> Flicker:
    """Run `model` with its live gates judging each image, and compare with `answers`.

    Args:
        model: the gated network, in evaluation mode; its own gates are left as they are.
        images: uint8 `[N, C, H, W]`, or a part of a data set.
        thresholds: epsilon of the gates that are to judge, by block; one or more.
        answers: float32 `[N, classes]`: what the network says with plain additions.
        labels: int64 `[N]`, or None.
    """
    judged, shut = _judged(model, normalize, images, thresholds)
    named, otherwise = answers.argmax(dim=1), judged.argmax(dim=1)
    return Flicker(
        blocks=tuple(shut),
        samples=len(answers),
        differ=_share(torch.stack(list(shut.values())).any(dim=0)),
        top1_differ=_share(named != otherwise),
        accuracy=None
        if labels is None
        else {"addition": _share(named == labels), "gate": _share(otherwise == labels)},
    )


def _judged(
    model: nn.Module,
    normalize: nn.Module,
    images: Tensor | Part,
    thresholds: Mapping[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits with gates that judge each image, and by block which images bool `[N]` it shut on."""
    gates = graph.gates(model)
    found: dict[str, list[Tensor]] = {block: [] for block in thresholds}

    def judge(block: str, epsilon: float) -> Any:
        def hook(gate: nn.Module, operands: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
            shortcut, branch = operands
            shut = branch.float().abs().flatten(1).amax(dim=1) <= epsilon
            found[block].append(shut)
            return torch.where(shut.view(-1, *[1] * (branch.dim() - 1)), shortcut, output)

        return hook

    handles = [
        gates[block].register_forward_hook(judge(block, epsilon))
        for block, epsilon in thresholds.items()
    ]
    try:
        device = next(iter(model.parameters())).device
        answers = logits(model, normalize, images.to(device)).cpu()
    finally:
        for handle in handles:
            handle.remove()
    order = [block for block in gates if block in found]
    return answers, {block: torch.cat(found[block]).cpu() for block in order}


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()
