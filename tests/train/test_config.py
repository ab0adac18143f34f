from __future__ import annotations

import json
from dataclasses import replace

import pytest

from eps_core.errors import ConfigError
from eps_train.config import TrainingConfig
from eps_train.recipes import RECIPES, digits, recipe
from eps_train.schedule import CosineDecay


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    made = recipe(name)
    assert made.recipe == name
    assert TrainingConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_baseline_differs_in_epsilon_alone() -> None:
    baseline = digits().baseline()
    assert baseline.plain
    assert replace(baseline, epsilon=digits().epsilon) == digits()
    timed = replace(digits(), epsilon=None, target_latency=0.5, timer="ort", max_accuracy_drop=1.0)
    assert timed.baseline() == baseline


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": -1}, "--epochs -1: must be finite and at least 0"),
        ({"batch_size": 1}, "--batch-size 1: must be finite and at least 2"),
        ({"epsilon": -1.0}, "--epsilon -1.0: must be finite and at least 0"),
        ({"patience": 1}, "--patience 1: must be finite and at least 2"),
        ({"lr_schedule": ((1, 0.1),)}, "--lr-schedule must start at epoch 0"),
        ({"lr_schedule": CosineDecay(-1.0)}, "--lr-schedule cosine:LR: LR must be finite"),
        (
            {"lr_schedule": CosineDecay(0.1), "lr_restart": ((0, 0.1),)},
            "--lr-restart only applies to a schedule of steps",
        ),
        ({"optimizer": "adamw", "nesterov": True}, "--nesterov only applies to --optimizer sgd"),
        (
            {"head_epochs": 1},
            "--head-epochs 1: gates would act .*; give --epsilon-warmup 2",
        ),
        ({"self_distillation": True}, "a network that has not learned yet; give --epsilon-warmup"),
        (
            {"self_distillation": True, "epsilon": 0.0},
            "--self-distillation only applies to runs that prune",
        ),
        ({"clip_grad_norm": 0.0}, "--clip-grad-norm 0.0: must be finite and above 0"),
        ({"ema": 1.0}, "--ema 1.0: must be 0 to 0.999999"),
        ({"momentum": 1.0}, "--momentum 1.0: must be 0 to 0.9999$"),
        ({"weight_decay": float("nan")}, "--weight-decay nan: must be finite and at least 0"),
        ({"precision": "fp8"}, "--precision fp8: must be one of fp32, tf32, bf16, fp16"),
        (
            {"epsilon": None},
            "--epsilon is missing; give it, or a target such as --target-parameters",
        ),
        ({"target_parameters": 0.3}, "--epsilon and --target-parameters contradict"),
        (
            {"target_parameters": 1.0, "epsilon": None},
            "--target-parameters 1.0: must be 0 to 1, both excluded",
        ),
        (
            {"target_speedup": 1.0, "epsilon": None},
            "--target-speedup 1.0: must be finite and above 1",
        ),
        (
            {"target_flops": 0.3, "target_speedup": 2.0, "epsilon": None},
            "--target-flops and --target-speedup contradict each other: a run has one target",
        ),
        ({"timer": "ort"}, "--timer only applies to --target-latency and --target-speedup"),
        ({"seed": 2**32}, "--seed 4294967296: must be 0 to 4294967295"),
        ({"max_accuracy_drop": 1.0}, "--max-accuracy-drop only applies to targets"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(digits(), **changes)  # type: ignore[arg-type]


def test_unknown_and_missing_fields_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="unknown configuration field speed; if an earlier version wr"
    ):
        TrainingConfig.from_dict({**digits().to_dict(), "speed": 9})
    with pytest.raises(ConfigError, match=r"^object missing required field `dataset`$"):
        TrainingConfig.from_dict({"recipe": "digits"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", "ten"),
        ("epochs", 2.5),
        ("epochs", True),
        ("flip", 1),
        ("lr_schedule", [[0, "fast"]]),
        ("image_size", 8),
        ("epsilon", "none"),
    ],
)
def test_fields_of_another_type_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}(\[.*)?: expected .*, got "):
        TrainingConfig.from_dict({**digits().to_dict(), field: value})
