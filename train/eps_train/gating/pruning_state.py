"""Pruning state: which blocks are dead. Each is latched once, with evidence, and stays dead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from eps_train.gating.gate import EpsilonGate
from eps_train.training.checkpoint import GateRecord, PruneRecord
from eps_train.training.distributed import ALONE, Group


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
