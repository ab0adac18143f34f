from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from eps_core.errors import TrainingError
from eps_train import recipes
from eps_train.config import TrainingConfig
from eps_train.data.dataset import DATASETS
from eps_train.data.images import ImageSet
from eps_train.gating import rewriting
from eps_train.gating.gate import EpsilonGate
from eps_train.models.spec import NetworkSpec
from eps_train.schedule import CosineDecay
from eps_train.training.checkpoint import GateRecord, PruneRecord
from eps_train.training.evaluate import EpochMetrics, Score
from eps_train.training.run_checks import (
    PruneLog,
    average_warning,
    decay_exponent,
    nonfinite_block,
    require_no_collapse,
    schedule_warning,
    weights_warning,
    zero_branches_warning,
)


def plan(config: TrainingConfig) -> str | None:
    """What is said before `config` is trained on the set that it names."""
    steps = DATASETS[config.dataset].train // config.batch_size
    return schedule_warning(config, steps=steps)


def small(**changes: Any) -> TrainingConfig:
    """The runs of paper.md, "Tried on small data": 40 epochs at a fixed learning rate."""
    return replace(recipes.digits(), model="cifar:32x16", epochs=40, final_decay=(), **changes)


# -- before training


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_no_recipe_is_warned_of(name: str) -> None:
    config = recipes.recipe(name)
    if config.dataset in DATASETS:
        assert plan(config) is None
    assert plan(replace(config, dataset="cifar10").baseline()) is None
    if name == "finetune":
        assert weights_warning(config) is None


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, True),  # the recipe's 0.1
        ({"lr_schedule": ((0, 0.02),)}, False),
        ({"lr_schedule": CosineDecay(0.02)}, False),
        ({"lr_schedule": ((0, 0.1),), "momentum": 0.0}, False),
        ({"lr_schedule": CosineDecay(0.02), "optimizer": "adamw"}, True),
        ({"lr_schedule": CosineDecay(5e-4), "optimizer": "adamw"}, False),
        ({"epochs": 0}, False),
    ],
)
def test_a_learning_rate_that_destroys_pretrained_weights(
    changes: dict[str, Any], warned: bool
) -> None:
    found = weights_warning(replace(recipes.digits(), **changes))
    assert (found is not None) is warned
    if found is not None:
        assert "destroys pretrained weights" in found
        assert "--recipe finetune, or --lr-schedule cosine:0.0" in found


def test_an_average_over_most_of_the_run_is_warned_of() -> None:
    run = replace(recipes.digits(), epochs=10, ema=0.999)
    found = average_warning(run, steps=20)
    assert found == (
        "--ema 0.999 averages over about 1,000 of the run's 200 steps, so that early weights stay"
        " in it; give --ema 0.9 or less"
    )
    assert average_warning(replace(run, ema=0.9), steps=20) is None
    assert average_warning(replace(run, ema=0.0), steps=20) is None


def test_the_decay_of_adamw_is_not_amplified_by_momentum() -> None:
    sgd, adamw = (replace(recipes.digits(), optimizer=name) for name in ("sgd", "adamw"))
    found = decay_exponent(adamw, steps=20)
    assert found == pytest.approx(0.1 * decay_exponent(sgd, steps=20))


def test_the_exponent_is_the_sum_over_the_schedule() -> None:
    """36 epochs at 0.1, 12 at 0.01, 12 at 0.001; 20 steps each; decay 5e-3; momentum 0.9."""
    lrs = 36 * 0.1 + 12 * 0.01 + 12 * 0.001
    found = decay_exponent(recipes.digits(), steps=20)
    assert found == pytest.approx(lrs * 20 * 5e-3 / 0.1)
    late = replace(recipes.digits(), epsilon_warmup=30, freeze_gates_at=0.9)
    lrs = 6 * 0.1 + 12 * 0.01 + 6 * 0.001
    assert decay_exponent(late, steps=20) == pytest.approx(lrs * 20 * 5e-3 / 0.1)


def test_the_run_in_which_no_block_died_is_warned_of_and_the_other_not() -> None:
    weak = plan(small(weight_decay=2e-4))
    assert weak is not None
    assert "weight decay leaves 85% of a closed branch after 800 steps" in weak
    assert plan(small(weight_decay=5e-3)) is None


def test_its_remedies_help() -> None:
    warning = plan(small(weight_decay=2e-4))
    assert warning is not None
    epochs = int(warning.split("--epochs ")[1].split()[0])
    weight_decay = float(warning.split("--weight-decay ")[1].split()[0])
    assert plan(small(weight_decay=weight_decay)) is None
    assert plan(replace(small(weight_decay=2e-4), epochs=epochs)) is None
    config = replace(small(weight_decay=2e-4), epsilon=None, target_parameters=0.5)
    assert plan(config) is None


def test_without_any_decay_more_epochs_are_not_offered() -> None:
    warning = plan(small(weight_decay=0.0))
    assert warning is not None
    assert "leaves 100% of a closed branch" in warning
    assert "--epochs" not in warning


def test_a_decay_that_would_do_harm_is_not_offered() -> None:
    warning = plan(replace(recipes.digits(), epochs=3))
    assert warning is not None
    assert "--epochs" in warning
    assert "--weight-decay" not in warning


@pytest.mark.parametrize(
    "changes",
    [{"epochs": 1}, {"epsilon_warmup": 59}, {"epsilon_warmup": 30, "freeze_gates_at": 0.5}],
)
def test_a_run_too_short_for_any_death(changes: dict[str, Any]) -> None:
    warning = plan(replace(recipes.digits(), **changes))
    assert warning is not None
    assert warning.startswith("no block can die: epsilon acts in")


# -- branches that start at zero


def network(*, silent: bool) -> nn.Module:
    torch.manual_seed(0)
    model = NetworkSpec.parse("cifar:8x4", in_channels=1, classes=10).build()
    if silent:
        for name, weight in model.named_parameters():
            if name.endswith("conv2.weight"):
                nn.init.zeros_(weight)
    return model


def test_branches_that_start_at_zero_are_named_and_nothing_is_changed() -> None:
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    images = ImageSet(pixels, torch.zeros(40, dtype=torch.int64))
    for silent in (True, False):
        model = network(silent=silent).train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        gates = rewriting.gates(model)
        warning = zero_branches_warning(model, _Scaled(), gates, images, epsilon=2.5)
        assert (warning is not None) == silent
        assert zero_branches_warning(model, _Scaled(), gates, images, epsilon=0) is None
        assert model.training
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert zero_branches_warning(model, _Scaled(), {}, images, epsilon=2.5) is None


def test_the_line_names_a_block_and_the_remedy() -> None:
    model = network(silent=True)
    pixels = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    images = ImageSet(pixels, torch.zeros(8, dtype=torch.int64))
    warning = zero_branches_warning(model, _Scaled(), rewriting.gates(model), images, epsilon=2.5)
    assert warning is not None
    assert warning.startswith("3 of 3 branches start at zero (stages.0.0, ...)")
    assert "--epsilon-warmup" in warning


@pytest.mark.parametrize(
    ("name", "warned"), [("resnet26d", True), ("convnext_atto", True), ("resnetv2_50", False)]
)
def test_timms_branches_that_start_at_zero(timm_models: None, name: str, warned: bool) -> None:
    """By a norm of weight 0, by a scale of 1e-6, and not at all."""
    torch.manual_seed(0)
    model = NetworkSpec.parse(f"timm:{name}", in_channels=3, classes=10).build()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    images = ImageSet(pixels, torch.zeros(2, dtype=torch.int64))
    gates = rewriting.gates(model)
    warning = zero_branches_warning(model, _Scaled(), gates, images, epsilon=2.5)
    assert (warning is not None) == warned


class _Scaled(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float() / 255


# -- while the run trains

DEATH = PruneRecord(epoch=2, epsilon=2.5, steps=20, peak=1.0, heldout_peak=1.0, samples=9)
LABELS = torch.arange(10).repeat(10)
STAGES = {f"stages.{stage}.{block}": f"stages.{stage}" for stage in (0, 1) for block in (0, 1)}


def report(
    epoch: int, *, loss: float, dead: tuple[str, ...] = (), died: tuple[str, ...] = ()
) -> EpochMetrics:
    blocks = ("stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1")
    return EpochMetrics(
        epoch=epoch,
        lr=0.1,
        epsilon=2.5,
        loss=loss,
        train_accuracy=0.5,
        validation=Score(0.5, 5.0, 100),  # swings, as it does at a high learning rate
        discarded=0.0,
        died=died,
        gates=tuple(
            GateRecord(
                block=block,
                epsilon=2.5,
                steps=10,
                closed_steps=0,
                peak=3.0,
                death=DEATH if block in dead else None,
            )
            for block in blocks
        ),
        parameters=100,
        best=False,
        seconds=1.0,
        images=100,
    )


def test_deaths_before_anything_was_learned_are_told_once() -> None:
    watch = PruneLog(recipes.digits(), LABELS, STAGES)
    assert watch.observe(report(1, loss=2.3)) == []
    (warning,) = watch.observe(report(2, loss=1.9, dead=("stages.0.0",), died=("stages.0.0",)))
    assert "blocks died in epoch 2, before the network has learned much" in warning
    assert "the best loss so far is 1.90, where guessing gives 2.30" in warning
    assert "--epsilon-warmup" in warning
    both = ("stages.0.0", "stages.1.0")
    assert watch.observe(report(3, loss=1.8, dead=both, died=("stages.1.0",))) == []


def test_deaths_of_a_network_that_has_learned_are_no_cause_for_alarm() -> None:
    watch = PruneLog(recipes.digits(), LABELS, STAGES)
    assert watch.observe(report(1, loss=0.9)) == []
    died = report(2, loss=1.6, dead=("stages.0.0",), died=("stages.0.0",))
    assert watch.observe(died) == []


def test_a_lost_stage_is_told_once_even_when_all_is_well() -> None:
    watch = PruneLog(recipes.digits(), LABELS, STAGES)
    watch.observe(report(1, loss=0.1, dead=("stages.1.0",), died=("stages.1.0",)))
    lost = ("stages.1.0", "stages.1.1")
    (warning,) = watch.observe(report(2, loss=0.1, dead=lost, died=("stages.1.1",)))
    assert warning.startswith("every block of stages.1 has died by epoch 2")
    assert "lower --epsilon" in warning
    assert watch.observe(report(3, loss=0.1, dead=lost)) == []


@pytest.mark.parametrize(
    ("target", "remedy"),
    [
        ({"target_parameters": 0.3}, "raise --target-parameters"),
        ({"target_latency": 0.3}, "raise --target-latency"),
        ({"target_speedup": 3.0}, "lower --target-speedup"),
    ],
)
def test_the_remedy_with_a_target_is_to_ask_for_less(target: dict[str, Any], remedy: str) -> None:
    config = replace(recipes.digits(), epsilon=None, **target)
    watch = PruneLog(config, LABELS, STAGES)
    lost = ("stages.1.0", "stages.1.1")
    (warning,) = watch.observe(report(2, loss=0.1, dead=lost, died=lost))
    assert f"; {remedy}, or let it" in warning or f", {remedy}, or let it" in warning


def test_a_resumed_run_does_not_repeat_itself() -> None:
    lost = ("stages.1.0", "stages.1.1")
    before = [{"loss": 2.0, "validation": {"loss": 2.1}, "died": list(lost)}]
    records = report(1, loss=2.0, dead=lost).gates
    watch = PruneLog(recipes.digits(), LABELS, STAGES, before=before, records=records)
    dead = (*lost, "stages.0.0")
    assert watch.observe(report(2, loss=1.9, dead=dead, died=("stages.0.0",))) == []


def test_rare_classes_make_guessing_easier() -> None:
    """Nine of ten images are of one class: a loss of 0.3 is what guessing gives, not success."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    watch = PruneLog(recipes.digits(), labels, STAGES)
    died = report(1, loss=0.3, dead=("stages.0.0",), died=("stages.0.0",))
    assert len(watch.observe(died)) == 1


def test_a_stage_that_dies_before_anything_was_learned() -> None:
    death = PruneRecord(epoch=2, epsilon=1.0, steps=20, peak=0.5, heldout_peak=0.5, samples=9)
    dead = GateRecord(block="one", epsilon=1.0, steps=10, closed_steps=10, peak=0.5, death=death)
    with pytest.raises(TrainingError, match=r"^every block of the first died by epoch 5"):
        require_no_collapse(
            [dead], Score(0.2, 2.0, 9), LABELS, epoch=5, stages={"one": "the first"}
        )


def test_the_first_non_finite_block_of_the_earliest_step_is_named() -> None:
    gates = {block: EpsilonGate(2.0).train() for block in ("a", "b")}
    factors = {"a": 1.0, "b": 1.0}

    def step() -> None:
        for block, gate in gates.items():
            gate(torch.zeros(2, 1), torch.full((2, 1), factors[block]))

    step()
    assert nonfinite_block(gates) is None
    factors["b"] = float("inf")
    step()
    factors["a"] = float("nan")
    step()
    assert nonfinite_block(gates) == ("b", 2)
