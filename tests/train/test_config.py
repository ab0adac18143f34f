from __future__ import annotations

import json
from dataclasses import replace

import pytest

from eps_train.config import TrainingConfig
from eps_train.errors import ConfigError
from eps_train.recipes import RECIPES, digits, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    made = recipe(name)
    assert made.recipe == name
    assert TrainingConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_baseline_differs_in_epsilon_alone() -> None:
    baseline = digits().baseline()
    assert baseline.plain
    assert replace(baseline, epsilon=digits().epsilon) == digits()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"epsilon": -1.0}, "--epsilon -1: must be finite"),
        ({"closed_epochs": 1}, "one closed epoch proves nothing"),
        ({"rates": ((1, 0.1),)}, "rates must start at epoch 0"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(digits(), **changes)  # type: ignore[arg-type]


def test_unknown_and_missing_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown configuration field speed"):
        TrainingConfig.from_dict({**digits().to_dict(), "speed": 9})
    with pytest.raises(ConfigError, match="not a training configuration"):
        TrainingConfig.from_dict({"recipe": "digits"})
