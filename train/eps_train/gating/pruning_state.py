"""Which blocks are dead: latched once, with the evidence, and never judged again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eps_train.data.images import Part
from eps_train.gating.gate import EpsilonGate, response
from eps_train.training.checkpoint import GateRecord, PruneRecord
from eps_train.training.distributed import ALONE, Group
from eps_train.training.evaluate import logits


class Counters(NamedTuple):
    """A gate's record of an epoch: steps, those on which it was closed, those with a finite
    response, and the largest response."""

    steps: int
    closed: int
    finite: int
    peak: float


@dataclass(slots=True)
class _Streak:
    """Epochs in a row in which a gate never opened, and what was seen of its branch in them."""

    epochs: int = 0
    steps: int = 0
    peak: float = 0.0


class BlockTracker:
    """The gates' history over a run: last records, streaks of closed epochs, and deaths."""

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
        self, gates: dict[str, EpsilonGate], thresholds: Mapping[str, float], group: Group = ALONE
    ) -> float:
        """Read the live gates' counters, once an epoch; reset them.

        `thresholds` are what the gates judged by in that epoch.

        Where every process of `group` judges its own part of the batch, a step counts once for
        each of them, so that a gate was closed on every step only if it was on all of them.

        Returns the count of discarded blocks averaged over the epoch's steps, dead ones included.
        """
        live = {block: gates[block] for block in gates if block not in self.dead}
        discarded = float(len(self.dead))
        for block, (steps, closed, _, peak) in read_counters(live, group).items():
            self.records[block] = GateRecord(
                block=block, epsilon=thresholds[block], steps=steps, closed_steps=closed, peak=peak
            )
            streak = self._streaks[block]
            if steps and closed == steps:
                self._streaks[block] = _Streak(
                    streak.epochs + 1, streak.steps + steps, max(streak.peak, peak)
                )
            else:
                self._streaks[block] = _Streak()
            discarded += closed / max(steps, 1)
            live[block].reset_record()
        return discarded

    def latch(
        self,
        gates: dict[str, EpsilonGate],
        model: nn.Module,
        normalize: nn.Module,
        heldout: Tensor | Part,
        *,
        epoch: int,
        group: Group = ALONE,
    ) -> tuple[str, ...]:
        """Latch every gate that was closed long enough and that held-out images confirm.

        The images (uint8 `[N, C, H, W]`, or a part that is read batch by batch) pass through the
        network in evaluation mode as training had it: with the candidates shut. The leader of
        `group` looks at them for all. Returns the
        blocks that died now, in network order.
        """
        candidates = [
            block
            for block in gates
            if self.records[block].death is None and self._streaks[block].epochs >= self.patience
        ]
        if not candidates:
            return ()
        watched = {block: gates[block] for block in candidates}
        for gate in watched.values():
            gate.latch()

        def look() -> dict[str, float]:
            with watch_branches(watched, response) as found:
                logits(model, normalize, heldout)
            return {block: torch.stack(peaks).max().item() for block, peaks in found.items()}

        heldout_peaks = group.lead(look)
        died = []
        for block, gate in watched.items():
            record, streak = self.records[block], self._streaks[block]
            peak = heldout_peaks[block]
            if peak < record.epsilon:
                death = PruneRecord(
                    epoch=epoch + 1,
                    epsilon=record.epsilon,
                    steps=streak.steps,
                    peak=streak.peak,
                    heldout_peak=peak,
                    samples=len(heldout),
                )
                self.records[block] = replace(record, death=death)
                died.append(block)
            else:
                gate.unlatch()
                self._streaks[block] = _Streak()
        return tuple(died)

    def state(self) -> dict[str, Any]:
        return {block: asdict(streak) for block, streak in self._streaks.items()}

    def restore(self, records: list[GateRecord], state: dict[str, Any]) -> None:
        self.records = {record.block: record for record in records}
        self._streaks = {block: _Streak(**fields) for block, fields in state.items()}


@contextmanager
def watch_branches(
    gates: Mapping[str, EpsilonGate], measure: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, list[Tensor]]]:
    """Collect `measure(branch)` of every call of the given gates, by block.

    The measurements stay on the device, so that nothing waits for it.
    """
    found: dict[str, list[Tensor]] = {block: [] for block in gates}

    def watch(block: str) -> Any:
        def hook(gate: nn.Module, operands: tuple[Tensor, Tensor]) -> None:
            found[block].append(measure(operands[1].detach()))

        return hook

    handles = [gate.register_forward_pre_hook(watch(block)) for block, gate in gates.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def nonfinite_block(gates: dict[str, EpsilonGate]) -> tuple[str, int] | None:
    """The first block, at the earliest step of this epoch, whose response was not finite.

    Returns its name and the 1-based step, or None. Within a step the network's order decides:
    everything behind the first bad block is bad too.
    """
    bad = []
    for order, (block, gate) in enumerate(gates.items()):
        finite, steps = int(gate.finite_steps), int(gate.steps)
        if finite < steps:
            bad.append((finite + 1, order, block))
    if not bad:
        return None
    step, _, block = min(bad)
    return block, step


def read_counters(gates: dict[str, EpsilonGate], group: Group = ALONE) -> dict[str, Counters]:
    """The gates' records of this epoch, over all processes of `group`.

    The counts of processes that judge for themselves add up. Where the gates judge together, they
    are the same in all, and count once.
    """
    if not gates:
        return {}
    counts = torch.stack(
        [torch.stack([g.steps, g.closed_steps, g.finite_steps]) for g in gates.values()]
    )
    peaks = torch.stack([gate.peak for gate in gates.values()])
    if all(gate.process_group is None for gate in gates.values()):
        group.add(counts)
        group.largest(peaks)
    return {
        block: Counters(steps, closed, finite, peak)
        for block, (steps, closed, finite), peak in zip(
            gates, counts.tolist(), peaks.tolist(), strict=True
        )
    }


def write_counters(gates: Mapping[str, EpsilonGate], counters: Mapping[str, Iterable[Any]]) -> None:
    """Set the gates' records to what :func:`read_counters` found."""
    for block, values in counters.items():
        steps, closed, finite, peak = values
        gate = gates[block]
        gate.steps.fill_(steps)
        gate.closed_steps.fill_(closed)
        gate.finite_steps.fill_(finite)
        gate.peak.fill_(peak)
