"""Pruning state: which blocks are dead, and how important the others are.

A block is latched once, with evidence, and stays dead. Its importance is a score by a criterion;
the block with the lowest score goes first. Scores are accumulated on the device over the training
steps of an epoch and read once, at its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from eps_train.gating import rewriting
from eps_train.gating.gate import EpsilonGate, relative_response
from eps_train.training.checkpoint import GateRecord, PruneRecord
from eps_train.training.distributed import ALONE, Group

# -- Dead blocks


@dataclass(slots=True)
class _Streak:
    """Consecutive epochs in which a gate never opened, and their steps and largest response."""

    epochs: int = 0
    steps: int = 0
    peak: float = 0.0


class BlockTracker:
    """Tracks the gates of a run: last records, streaks of closed epochs, and dead blocks.

    Attributes:
        patience: whole closed epochs after which a block is a candidate for removal.
        records: the last record of every gated block, in the order of computation.
    """

    def __init__(self, blocks: tuple[str, ...], *, patience: int) -> None:
        self.patience = patience
        self.records = {
            block: GateRecord(block=block, epsilon=0.0, steps=0, closed_steps=0, peak=0.0)
            for block in blocks
        }
        self._streaks = {block: _Streak() for block in blocks}

    @property
    def dead(self) -> tuple[str, ...]:
        return tuple(b for b, record in self.records.items() if record.death is not None)

    def record_epoch(
        self,
        gates: Mapping[str, EpsilonGate],
        thresholds: Mapping[str, float],
        group: Group = ALONE,
    ) -> float:
        """Read and reset the counters of the live gates, once an epoch.

        Where every process of `group` judges its own part of the batch, a step counts once for
        each of them, so that a gate was closed on every step only if it was in all processes.
        Where the gates judge together, the counters are the same in all, and count once.

        `thresholds` are the epsilons of that epoch. Returns the number of discarded blocks,
        averaged over the epoch's steps, dead ones included.
        """
        live = {block: gate for block, gate in gates.items() if block not in self.dead}
        discarded = float(len(self.dead))
        if not live:
            return discarded
        counts = torch.stack([torch.stack([g.steps, g.closed_steps]) for g in live.values()])
        peaks = torch.stack([gate.peak for gate in live.values()])
        if all(gate.process_group is None for gate in live.values()):
            group.add(counts)
            group.largest(peaks)
        for (block, gate), (steps, closed), peak in zip(
            live.items(), counts.tolist(), peaks.tolist(), strict=True
        ):
            self.records[block] = GateRecord(
                block=block, epsilon=thresholds[block], steps=steps, closed_steps=closed, peak=peak
            )
            if steps and closed == steps:
                streak = self._streaks[block]
                streak.epochs, streak.steps = streak.epochs + 1, streak.steps + steps
                streak.peak = max(streak.peak, peak)
            else:
                self._streaks[block] = _Streak()
            discarded += closed / max(steps, 1)
            gate.reset_record()
        return discarded

    def latch(
        self,
        gates: Mapping[str, EpsilonGate],
        evaluate: Callable[[], int],
        *,
        epoch: int,
        group: Group = ALONE,
    ) -> tuple[str, ...]:
        """Latch every gate that was closed long enough, if held-out images confirm it.

        A block is dead when its largest response on held-out images, with the candidates shut, is
        below epsilon. The leader of `group` measures it.

        Args:
            gates: of the network that ships: the one that is trained, or an average of it.
            evaluate: passes the held-out images through that network in evaluation mode, and
                returns their number.
            epoch: 0-based.

        Returns:
            The blocks that died, in network order.
        """
        candidates = {
            block: gate
            for block, gate in gates.items()
            if self.records[block].death is None and self._streaks[block].epochs >= self.patience
        }
        if not candidates:
            return ()
        for gate in candidates.values():
            gate.latch()

        def measure() -> tuple[dict[str, float], int]:
            with watch_gates(candidates, EpsilonGate.measure) as found:
                samples = evaluate()
            peaks = {block: torch.stack(peaks).max().item() for block, peaks in found.items()}
            return peaks, samples

        heldout_peaks, samples = group.lead(measure)
        died = []
        for block, gate in candidates.items():
            record, streak = self.records[block], self._streaks[block]
            if heldout_peaks[block] < record.epsilon:
                death = PruneRecord(
                    epoch=epoch + 1,
                    epsilon=record.epsilon,
                    steps=streak.steps,
                    peak=streak.peak,
                    heldout_peak=heldout_peaks[block],
                    samples=samples,
                )
                self.records[block] = replace(record, death=death)
                died.append(block)
            else:  # also when it is NaN
                gate.unlatch()
                self._streaks[block] = _Streak()
        return tuple(died)

    def state_dict(self) -> dict[str, Any]:
        return {
            "records": msgspec.to_builtins(self.records),
            "streaks": msgspec.to_builtins(self._streaks),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.records = msgspec.convert(state["records"], dict[str, GateRecord])
        self._streaks = msgspec.convert(state["streaks"], dict[str, _Streak])


@contextmanager
def watch_gates(
    gates: Mapping[str, EpsilonGate], measure: Callable[[EpsilonGate, Tensor, Tensor], Tensor]
) -> Iterator[dict[str, list[Tensor]]]:
    """Collect `measure(gate, shortcut, branch)` for every call of the given gates, by block.

    The measurements stay on the device, so that nothing waits for it.
    """
    found: dict[str, list[Tensor]] = {block: [] for block in gates}

    def record(block: str, gate: EpsilonGate, operands: tuple[Tensor, Tensor]) -> None:
        shortcut, branch = operands
        found[block].append(measure(gate, shortcut.detach(), branch.detach()))

    with ExitStack() as hooks:
        for block, gate in gates.items():
            hooks.callback(gate.register_forward_pre_hook(partial(record, block)).remove)
        yield found


# -- Importance


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
        self._hooks = ExitStack()
        self._model = model
        self.observe(model)

    def observe(self, model: fx.GraphModule) -> None:
        """Continue with `model`, the network so far without some of its blocks."""
        self.close()
        self._model, gates = model, rewriting.gates(model)
        sums = {block: gate.peak.new_zeros(()) for block, gate in gates.items()}
        self._sums = {block: self._sums.get(block, fresh) for block, fresh in sums.items()}
        if self.criterion in _OBSERVED:
            for block, gate in gates.items():
                handle = gate.register_forward_hook(_hook(self.criterion, self._sums[block]))
                self._hooks.callback(handle.remove)

    def close(self) -> None:
        """Observe no longer."""
        self._hooks.close()

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
