from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from eps_train.gating.gate import EpsilonGate, response
from eps_train.gating.pruning_state import BlockTracker, nonfinite_block, watch_branches

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


def epoch(model: TwoBlocks, registry: BlockTracker, steps: int = 3) -> float:
    model.train()
    for _ in range(steps):
        model(torch.zeros(2, 1, 2, 2))
    return registry.record_epoch(gates_of(model), dict.fromkeys(gates_of(model), EPSILON))


def latch(model: TwoBlocks, registry: BlockTracker, at: int) -> tuple[str, ...]:
    images = torch.zeros(5, 1, 2, 2)
    return registry.latch(gates_of(model), model, nn.Identity(), images, epoch=at)


def test_a_block_dies_after_k_whole_closed_epochs_and_not_before() -> None:
    model, registry = TwoBlocks(1.0, 3.0), BlockTracker(BLOCKS, patience=3)
    died = []
    for at in range(4):
        epoch(model, registry)
        died.append(latch(model, registry, at))
    assert died == [(), (), ("a",), ()]
    assert registry.dead == ("a",)
    death = registry.records["a"].death
    assert death is not None
    assert (death.epoch, death.steps, death.peak, death.heldout_peak) == (3, 9, 1.0, 1.0)
    assert (death.epsilon, death.samples) == (EPSILON, 5)


def test_one_open_step_starts_the_count_anew() -> None:
    model, registry = TwoBlocks(1.0, 3.0), BlockTracker(BLOCKS, patience=2)
    epoch(model, registry)
    model.factors["a"] = 5.0
    model.train()
    model(torch.zeros(2, 1, 2, 2))
    model.factors["a"] = 1.0
    epoch(model, registry)
    assert latch(model, registry, 1) == ()
    epoch(model, registry)
    assert latch(model, registry, 2) == ()
    epoch(model, registry)
    assert latch(model, registry, 3) == ("a",)


def test_held_out_images_that_contradict_training_keep_a_block_alive() -> None:
    model, registry = TwoBlocks(1.0, 3.0), BlockTracker(BLOCKS, patience=2)
    epoch(model, registry)
    epoch(model, registry)
    model.factors["a"] = EPSILON  # not below epsilon
    assert latch(model, registry, 1) == ()
    assert registry.dead == ()
    assert not bool(gates_of(model)["a"].dead)


def test_a_latched_gate_is_never_judged_again() -> None:
    model, registry = TwoBlocks(1.0, 3.0), BlockTracker(BLOCKS, patience=2)
    for at in range(2):
        epoch(model, registry)
        latch(model, registry, at)
    before = registry.records["a"]
    model.factors["a"] = 50.0
    discarded = epoch(model, registry)
    assert latch(model, registry, 2) == ()
    assert registry.records["a"] == before
    assert discarded == 1.0
    model.eval()
    assert model(torch.zeros(1, 1, 1, 1)).item() == 3.0, "the dead branch stays shut"


def test_discarded_is_the_mean_count_over_the_steps() -> None:
    model, registry = TwoBlocks(1.0, 3.0), BlockTracker(BLOCKS, patience=9)
    model.train()
    for factor in (1.0, 1.0, 1.0, 4.0):
        model.factors["a"] = factor
        model(torch.zeros(2, 1, 2, 2))
    assert registry.record_epoch(gates_of(model), dict.fromkeys(gates_of(model), EPSILON)) == 0.75
    assert registry.records["a"].peak == 4.0
    assert registry.records["a"].closed_steps == 3


def test_restored_registry_goes_on_counting() -> None:
    model, registry = TwoBlocks(1.0, 3.0), BlockTracker(BLOCKS, patience=2)
    epoch(model, registry)
    again = BlockTracker(BLOCKS, patience=2)
    again.restore(list(registry.records.values()), registry.state())
    epoch(model, again)
    assert latch(model, again, 1) == ("a",)


def test_the_first_non_finite_block_of_the_earliest_step_is_named() -> None:
    model = TwoBlocks(1.0, 1.0)
    model.train()
    model(torch.zeros(2, 1, 2, 2))
    assert nonfinite_block(gates_of(model)) is None
    model.factors["b"] = float("inf")
    model(torch.zeros(2, 1, 2, 2))
    model.factors["a"] = float("nan")
    model(torch.zeros(2, 1, 2, 2))
    assert nonfinite_block(gates_of(model)) == ("b", 2)


def test_watched_peaks_are_those_of_every_call_and_watching_ends() -> None:
    model = TwoBlocks(1.0, -3.0).eval()
    gates: dict[str, Any] = gates_of(model)
    with watch_branches(gates, response) as peaks:
        model(torch.zeros(2, 1, 2, 2))
        model(torch.zeros(2, 1, 2, 2))
    model(torch.zeros(2, 1, 2, 2))
    assert peaks == {"a": [1.0, 1.0], "b": [3.0, 3.0]}


@pytest.mark.parametrize("training", [True, False])
def test_a_pass_over_held_out_images_leaves_the_mode_as_it_was(training: bool) -> None:
    model, registry = TwoBlocks(1.0, 3.0), BlockTracker(BLOCKS, patience=2)
    epoch(model, registry)
    epoch(model, registry)
    model.train(training)
    latch(model, registry, 1)
    assert model.training is training
    assert int(gates_of(model)["b"].steps) == 0, "an evaluation pass is no training step"
