"""The recipes against the paper's table of schedules (its section 4.1, and the authors' code)."""

from __future__ import annotations

import pytest

from eps_train.config import TrainingConfig
from eps_train.errors import ConfigError
from eps_train.recipes import RECIPES, recipe
from eps_train.schedule import RateSchedule

CIFAR = [name for name in RECIPES if name.startswith("cifar")]
SVHN = [name for name in RECIPES if name.startswith("svhn")]


def schedule(run: TrainingConfig) -> RateSchedule:
    return RateSchedule(
        epochs=run.epochs, rates=run.rates, restart=run.restart, descent=run.descent
    )


def cifar_rate(epoch: int) -> float:
    return 0.1 if epoch < 82 else 0.01 if epoch < 123 else 0.001 if epoch < 300 else 0.0002


def cifar_rate_after_a_loss(since: int) -> float:
    return 0.1 if since < 41 else 0.01 if since < 61 else 0.001 if since < 150 else 0.0002


def svhn_rate(epoch: int) -> float:
    return 0.1 if epoch < 20 else 0.01 if epoch < 28 else 0.001 if epoch < 50 else 0.0001


def svhn_rate_after_a_loss(since: int) -> float:
    return 0.1 if since < 10 else 0.01 if since < 14 else 0.001 if since < 25 else 0.0001


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_rates_are_the_papers_epoch_by_epoch(name: str) -> None:
    plan = schedule(recipe(name))
    assert all(plan.rate(epoch) == cifar_rate(epoch) for epoch in range(plan.epochs))
    plan.observe(399, 3.0)
    for epoch in range(400, plan.descent_epoch):
        assert plan.rate(epoch) == cifar_rate_after_a_loss(epoch - 400), epoch


@pytest.mark.parametrize("name", SVHN)
def test_svhn_rates_are_the_papers_epoch_by_epoch(name: str) -> None:
    plan = schedule(recipe(name))
    assert all(plan.rate(epoch) == svhn_rate(epoch) for epoch in range(plan.epochs))
    plan.observe(99, 3.0)
    for epoch in range(100, plan.descent_epoch):
        assert plan.rate(epoch) == svhn_rate_after_a_loss(epoch - 100), epoch


@pytest.mark.parametrize("name", [*CIFAR, *SVHN])
def test_the_rest_is_the_papers_too(name: str) -> None:
    run = recipe(name)
    assert run.epsilon == (1.5 if name in SVHN else 2.5)
    assert (run.momentum, run.nesterov, run.batch_size) == (0.9, False, 128)
    assert (run.weight_decay, run.side_weight) == (2e-4, 0.1)
    assert run.epochs == (200 if name in SVHN else 1000)
    assert run.model == f"cifar:{name.rpartition('-')[2]}x16"
    assert run.flip == (name in CIFAR)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_ends_on_its_lowest_rate_even_after_a_late_loss(name: str) -> None:
    run = recipe(name)
    plan = schedule(run)
    plan.observe(plan.descent_epoch - 2, 9.0)
    lowest = min(value for steps in (run.rates, run.restart, run.descent) for _, value in steps)
    assert plan.rate(run.epochs - 1) == lowest


def test_an_unknown_recipe_is_refused_beside_the_known() -> None:
    with pytest.raises(ConfigError, match="--recipe cifar10: unknown; the recipes are: digits, c"):
        recipe("cifar10")
