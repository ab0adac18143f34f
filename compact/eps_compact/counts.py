"""What a compaction saved: blocks, parameters and FLOPs, before and after."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from eps_train import graph
from eps_train.cost import cost
from eps_train.network import NetworkSpec

Counts = dict[str, dict[str, int]]


def counts(
    built: NetworkSpec,
    removed: Collection[str],
    plain: nn.Module,
    input_shape: tuple[int, int, int],
) -> Counts:
    """`blocks`, `parameters` and `flops` (of one image), each `before` and `after`.

    Before is the network at full depth, without the side head, which is never deployed.

    Args:
        built: the network as it was built.
        removed: its blocks that are gone.
        plain: what is left, not folded.
        input_shape: `[C, H, W]` of an image.
    """
    skeleton = built.skeleton()
    blocks = len(graph.gates(skeleton))
    before, after = cost(skeleton, input_shape), cost(plain, input_shape)
    return {
        "blocks": {"before": blocks, "after": blocks - len(removed)},
        "parameters": {"before": before.parameters, "after": after.parameters},
        "flops": {"before": before.flops, "after": after.flops},
    }
