"""Criteria of block importance: which blocks a network would miss least.

A criterion gives every gated block a score; the block with the lowest score goes first. Scores are
accumulated on the device over the training steps of an epoch and read once, at its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from eps_train.gating import rewriting
from eps_train.gating.gate import relative_response


class BlockScores:
    """Scores of all gated blocks of a network while it trains.

    ============= =====================================================================
    criterion     score of a block `H = x + F(x)`
    ============= =====================================================================
    ``response``  largest `|F|` of any step, as the paper's gate judges it: the gates record it
    ``relative``  `max |F| / rms(x)`, mean over the steps: independent of the scale
    ``gradient``  `|<F, dL/dH>|`, mean over the steps. For `H = x + w F(x)` it is `|dL/dw|` at
                  `w = 1`: the first-order change of the loss when the block is removed
                  (Molchanov et al., CVPR 2019, 1906.10771, for whole blocks)
    ``influence`` `1 - cos(x, H)`, mean over images and steps (ShortGPT, 2403.03853)
    ``l1``        mean `|weight|` of the branch's convolutions and linear layers
    ``random``    a random order, from the seed
    ============= =====================================================================

    The hooks that observe the gates only read; they change no result of a training step.

    Args:
        model: a network with gates; its blocks may be removed later (:meth:`observe` again then).
        criterion: a name of the table.
        seed: of the ``random`` order.
    """

    def __init__(self, model: fx.GraphModule, criterion: str, *, seed: int = 0) -> None:
        self.criterion = criterion
        self._seed = seed
        self._sums: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._model = model
        self.observe(model)

    def observe(self, model: fx.GraphModule) -> None:
        """Continue with `model`, the network so far without some of its blocks."""
        self.close()
        self._model, gates = model, rewriting.gates(model)
        sums = {block: gate.peak.new_zeros(()) for block, gate in gates.items()}
        self._sums = {block: self._sums.get(block, fresh) for block, fresh in sums.items()}
        if self.criterion in _OBSERVED:
            self._handles = [
                gate.register_forward_hook(_hook(self.criterion, self._sums[block]))
                for block, gate in gates.items()
            ]

    def close(self) -> None:
        """Observe no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, float]:
        """Sum of the measurements of this epoch, by block; the gates count the steps."""
        return {block: total.item() for block, total in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue with the measurements of :meth:`state_dict`."""
        for block, total in self._sums.items():
            total.fill_(state[block])

    def read(self, group_sum: Callable[[Tensor], Tensor] = lambda total: total) -> dict[str, float]:
        """Return every block's score, and start anew; before the gates reset their records.

        Waits for the device. `group_sum` sums a tensor over all processes of a run.
        """
        if self.criterion == "random":
            order = sorted(self._sums)
            random.Random(self._seed).shuffle(order)
            return {block: float(order.index(block)) for block in self._sums}
        if self.criterion == "l1":
            return _mean_weights(self._model)
        if not self._sums:
            return {}
        gates = rewriting.gates(self._model)
        steps = group_sum(torch.stack([gates[block].steps for block in self._sums]))
        totals = group_sum(torch.stack(list(self._sums.values())))
        for total in self._sums.values():
            total.zero_()
        return dict(zip(self._sums, (totals / steps.clamp(min=1)).tolist(), strict=True))


_OBSERVED = ("relative", "gradient", "influence")
CRITERIA = ("response", *_OBSERVED, "l1", "random")


def _hook(criterion: str, total: Tensor) -> Callable[..., None]:
    """A forward hook of a gate that adds what the criterion measures to `total`, a scalar."""

    def add(found: Tensor) -> None:
        total.add_(found.to(total.dtype))

    def hook(gate: nn.Module, operands: tuple[Tensor, Tensor], result: Tensor) -> None:
        if not gate.training:
            return
        shortcut, branch = (operand.detach() for operand in operands)
        if criterion == "relative":
            add(relative_response(shortcut, branch))
        elif criterion == "influence":
            x, h = shortcut.flatten(1).float(), result.detach().flatten(1).float()
            add(1 - F.cosine_similarity(x, h).mean())
        elif result.requires_grad:
            result.register_hook(lambda gradient: add(gate_gradient(branch, gradient).abs()))

    return hook


def gate_gradient(branch: Tensor, gradient: Tensor) -> Tensor:
    """`<branch, gradient>`, float32 scalar: `dL/dw` of `x + w branch` at `w = 1`.

    Args:
        branch: the branch's output `F(x)`.
        gradient: of the loss with respect to the sum, of the same shape.
    """
    if branch.dim() == 4 and branch.is_contiguous(memory_format=torch.channels_last):
        branch, gradient = branch.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    return torch.dot(branch.reshape(-1).float(), gradient.reshape(-1).float())


def _mean_weights(model: fx.GraphModule) -> dict[str, float]:
    """Mean magnitude of the weights of each block's branch."""
    found = {}
    for gate, block in rewriting.gate_nodes(model).items():
        weights = [
            parameter.detach().abs()
            for node in rewriting.branch_nodes(gate)
            if node.op == "call_module"
            for parameter in model.get_submodule(str(node.target)).parameters()
            if parameter.dim() > 1
        ]
        count = sum(weight.numel() for weight in weights)
        total = sum(float(weight.sum()) for weight in weights)
        found[block] = total / count if count else 0.0
    return found
