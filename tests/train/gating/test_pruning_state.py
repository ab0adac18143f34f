from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from eps_train.gating.gate import EpsilonGate
from eps_train.gating.pruning_state import BlockTracker, watch_gates
from eps_train.training.evaluate import logits

EPSILON = 2.0
BLOCKS = ("a", "b")


class TwoBlocks(nn.Module):
    """`x + a(x) + b(x)` with branches that answer a constant times the input."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.factors = {"a": a, "b": b}
        self.gates = nn.ModuleDict({block: EpsilonGate(EPSILON) for block in BLOCKS})

    def forward(self, x: Tensor) -> Tensor:
        for block, gate in self.gates.items():
            x = gate(x, self.factors[block] * torch.ones_like(x))
        return x.flatten(1)


def gates_of(model: TwoBlocks) -> dict[str, EpsilonGate]:
    return cast(dict[str, EpsilonGate], dict(model.gates.items()))


def epoch(model: TwoBlocks, tracker: BlockTracker, steps: int = 3) -> float:
    model.train()
    for _ in range(steps):
        model(torch.zeros(2, 1, 2, 2))
    return tracker.record_epoch(gates_of(model), dict.fromkeys(gates_of(model), EPSILON))


def latch(model: TwoBlocks, tracker: BlockTracker, at: int) -> tuple[str, ...]:
    images = torch.zeros(5, 1, 2, 2)

    def evaluate() -> int:
        return len(logits(model, nn.Identity(), images))

    return tracker.latch(gates_of(model), evaluate, epoch=at)


def test_a_block_dies_after_k_whole_closed_epochs_and_not_before() -> None:
    model, tracker = TwoBlocks(1.0, 3.0), BlockTracker(BLOCKS, patience=3)
    died = []
    for at in range(4):
        epoch(model, tracker)
        died.append(latch(model, tracker, at))
    assert died == [(), (), ("a",), ()]
    assert tracker.dead == ("a",)
    death = tracker.records["a"].death
    assert death is not None
    assert (death.epoch, death.steps, death.peak, death.heldout_peak) == (3, 9, 1.0, 1.0)
    assert (death.epsilon, death.samples) == (EPSILON, 5)


def test_one_open_step_starts_the_count_anew() -> None:
    model, tracker = TwoBlocks(1.0, 3.0), BlockTracker(BLOCKS, patience=2)
    epoch(model, tracker)
    model.factors["a"] = 5.0
    model.train()
    model(torch.zeros(2, 1, 2, 2))
    model.factors["a"] = 1.0
    epoch(model, tracker)
    assert latch(model, tracker, 1) == ()
    epoch(model, tracker)
    assert latch(model, tracker, 2) == ()
    epoch(model, tracker)
    assert latch(model, tracker, 3) == ("a",)


def test_held_out_images_that_contradict_training_keep_a_block_alive() -> None:
    model, tracker = TwoBlocks(1.0, 3.0), BlockTracker(BLOCKS, patience=2)
    epoch(model, tracker)
    epoch(model, tracker)
    model.factors["a"] = EPSILON  # not below epsilon
    assert latch(model, tracker, 1) == ()
    assert tracker.dead == ()
    assert not bool(gates_of(model)["a"].dead)


def test_a_latched_gate_is_never_judged_again() -> None:
    model, tracker = TwoBlocks(1.0, 3.0), BlockTracker(BLOCKS, patience=2)
    for at in range(2):
        epoch(model, tracker)
        latch(model, tracker, at)
    before = tracker.records["a"]
    model.factors["a"] = 50.0
    discarded = epoch(model, tracker)
    assert latch(model, tracker, 2) == ()
    assert tracker.records["a"] == before
    assert discarded == 1.0
    model.eval()
    assert model(torch.zeros(1, 1, 1, 1)).item() == 3.0, "the dead branch stays shut"


def test_discarded_is_the_mean_count_over_the_steps() -> None:
    model, tracker = TwoBlocks(1.0, 3.0), BlockTracker(BLOCKS, patience=9)
    model.train()
    for factor in (1.0, 1.0, 1.0, 4.0):
        model.factors["a"] = factor
        model(torch.zeros(2, 1, 2, 2))
    assert tracker.record_epoch(gates_of(model), dict.fromkeys(gates_of(model), EPSILON)) == 0.75
    assert tracker.records["a"].peak == 4.0
    assert tracker.records["a"].closed_steps == 3


def test_restored_tracker_goes_on_counting() -> None:
    model, tracker = TwoBlocks(1.0, 3.0), BlockTracker(BLOCKS, patience=2)
    epoch(model, tracker)
    again = BlockTracker(BLOCKS, patience=2)
    again.load_state_dict(tracker.state_dict())
    epoch(model, again)
    assert latch(model, again, 1) == ("a",)


def test_watched_peaks_are_those_of_every_call_and_watching_ends() -> None:
    model = TwoBlocks(1.0, -3.0).eval()
    gates: dict[str, Any] = gates_of(model)
    with watch_gates(gates, EpsilonGate.measure) as peaks:
        model(torch.zeros(2, 1, 2, 2))
        model(torch.zeros(2, 1, 2, 2))
    model(torch.zeros(2, 1, 2, 2))
    assert peaks == {"a": [1.0, 1.0], "b": [3.0, 3.0]}


@pytest.mark.parametrize("training", [True, False])
def test_a_pass_over_held_out_images_leaves_the_mode_as_it_was(training: bool) -> None:
    model, tracker = TwoBlocks(1.0, 3.0), BlockTracker(BLOCKS, patience=2)
    epoch(model, tracker)
    epoch(model, tracker)
    model.train(training)
    latch(model, tracker, 1)
    assert model.training is training
    assert int(gates_of(model)["b"].steps) == 0, "an evaluation pass is no training step"
