"""The recipes against the paper's table of schedules (its section 4.1, and the authors' code)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from eps_core.errors import ConfigError
from eps_train.config import TrainingConfig
from eps_train.data.dataset import DATASETS
from eps_train.recipes import RECIPES, default, recipe
from eps_train.schedule import LearningRateSchedule

CIFAR = [name for name in RECIPES if name.startswith("cifar") and name != "cifar10-fast"]
SVHN = [name for name in RECIPES if name.startswith("svhn")]
IMAGENET = [name for name in RECIPES if name.startswith("imagenet")]


def schedule(run: TrainingConfig) -> LearningRateSchedule:
    return LearningRateSchedule(run)


def cifar_rate(epoch: int) -> float:
    return 0.1 if epoch < 82 else 0.01 if epoch < 123 else 0.001 if epoch < 300 else 0.0002


def cifar_rate_after_a_loss(since: int) -> float:
    return 0.1 if since < 41 else 0.01 if since < 61 else 0.001 if since < 150 else 0.0002


def svhn_rate(epoch: int) -> float:
    return 0.1 if epoch < 20 else 0.01 if epoch < 28 else 0.001 if epoch < 50 else 0.0001


def svhn_rate_after_a_loss(since: int) -> float:
    return 0.1 if since < 10 else 0.01 if since < 14 else 0.001 if since < 25 else 0.0001


def imagenet_rate(epoch: int) -> float:
    if epoch < 60:
        return 0.1 if epoch < 30 else 0.01
    return 1e-3 if epoch < 85 else 1e-4 if epoch < 95 else 1e-5


def test_there_is_a_recipe_for_every_network_of_the_paper() -> None:
    depths = ("110", "200", "500", "752")
    expected = {f"{name}-{depth}" for name in ("cifar10", "cifar100") for depth in depths}
    expected |= {"svhn-110", "svhn-200", "imagenet-101", "imagenet-152", "digits", "fashion-mnist"}
    expected |= {"images", "finetune", "cifar10-fast"}
    assert set(RECIPES) == expected
    assert all(recipe(name).recipe == name for name in RECIPES)
    assert all(
        recipe(name).dataset in DATASETS for name in RECIPES if name not in ("images", "finetune")
    )


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_rates_are_the_papers_epoch_by_epoch(name: str) -> None:
    plan = schedule(recipe(name))
    assert all(plan.lr(epoch) == cifar_rate(epoch) for epoch in range(plan.config.epochs))
    plan.observe(399, 3.0)
    for epoch in range(400, plan.decay_epoch):
        assert plan.lr(epoch) == cifar_rate_after_a_loss(epoch - 400), epoch


@pytest.mark.parametrize("name", SVHN)
def test_svhn_rates_are_the_papers_epoch_by_epoch(name: str) -> None:
    plan = schedule(recipe(name))
    assert all(plan.lr(epoch) == svhn_rate(epoch) for epoch in range(plan.config.epochs))
    plan.observe(99, 3.0)
    for epoch in range(100, plan.decay_epoch):
        assert plan.lr(epoch) == svhn_rate_after_a_loss(epoch - 100), epoch


@pytest.mark.parametrize(
    ("names", "first", "after"),
    [
        (CIFAR, cifar_rate, cifar_rate_after_a_loss),
        (SVHN, svhn_rate, svhn_rate_after_a_loss),
    ],
    ids=["cifar", "svhn"],
)
def test_each_loss_starts_the_second_table_anew(
    names: list[str], first: Callable[[int], float], after: Callable[[int], float]
) -> None:
    """A whole run epoch by epoch, with losses at chosen epochs, against the paper's two tables."""
    for name in names:
        plan = schedule(recipe(name))
        losses = {share * plan.config.epochs // 100 for share in (2, 3, 9, 40, 41, 70)}
        discarded, restarted = 0.0, None
        for epoch in range(plan.decay_epoch):
            expected = first(epoch) if restarted is None else after(epoch - restarted)
            assert plan.lr(epoch) == expected, (name, epoch)
            # Flickering gates move the mean count by less than a block: that is no loss.
            discarded += 1.0 if epoch in losses else 0.0
            assert plan.observe(epoch, discarded + 0.4 * (epoch % 2)) == (epoch in losses)
            restarted = epoch + 1 if epoch in losses else restarted


@pytest.mark.parametrize("name", [*CIFAR, *SVHN])
def test_the_last_descent_ends_on_the_papers_lowest_rate(name: str) -> None:
    run = recipe(name)
    plan = schedule(run)
    for epoch in range(plan.config.epochs):
        plan.observe(epoch, float(epoch))  # an epoch that lost a block, every time
    lr_schedule = [plan.lr(epoch) for epoch in range(plan.decay_epoch, plan.config.epochs)]
    assert lr_schedule == sorted(lr_schedule, reverse=True)
    assert lr_schedule[0] <= 0.01
    assert isinstance(run.lr_schedule, tuple)
    assert lr_schedule[-1] == run.lr_schedule[-1][1]
    assert len(lr_schedule) >= 0.1 * plan.config.epochs


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_rates_are_the_papers_epoch_by_epoch_whatever_is_lost(name: str) -> None:
    plan = schedule(recipe(name))
    for epoch in range(110):
        assert plan.lr(epoch) == imagenet_rate(epoch), epoch
        plan.observe(epoch, float(epoch))


@pytest.mark.parametrize(("name", "epsilon"), [("imagenet-101", 2.0), ("imagenet-152", 1.8)])
def test_the_rest_of_imagenet_is_the_papers_too(name: str, epsilon: float) -> None:
    run = recipe(name)
    assert (run.epsilon, run.epochs, run.batch_size) == (epsilon, 110, 256)
    assert (run.momentum, run.nesterov, run.weight_decay) == (0.9, True, 1e-4)
    assert (run.aux_loss_weight, run.lr_restart, run.final_decay) == (0.1, (), ())
    assert (run.augmentation, run.flip, run.normalization) == ("imagenet", True, "channel")
    assert run.model == f"imagenet:{name.rpartition('-')[2]}"
    outline = DATASETS[run.dataset]
    assert (outline.shape, outline.classes) == ((3, 224, 224), 1000)
    # The 1,281,167 training images, less the 10 a class that are held out; the paper's 5,000.
    assert outline.train == 1_281_167 - 10_000
    assert outline.train // run.batch_size == 4_965


@pytest.mark.parametrize("name", [*CIFAR, *SVHN])
def test_the_rest_is_the_papers_too(name: str) -> None:
    run = recipe(name)
    assert run.epsilon == (1.5 if name in SVHN else 2.5)
    assert (run.momentum, run.nesterov, run.batch_size) == (0.9, False, 128)
    assert (run.weight_decay, run.aux_loss_weight) == (2e-4, 0.1)
    assert run.epochs == (200 if name in SVHN else 1000)
    assert run.model == f"cifar:{name.rpartition('-')[2]}x16"
    assert run.flip == (name in CIFAR)
    assert (run.normalization, run.shift) == ("pixel", 4)
    assert run.augmentation == ("svhn" if name in SVHN else "shift")


def test_finetune_prunes_to_a_target_after_a_tenth_of_the_run() -> None:
    run = recipe("finetune")
    assert (run.epsilon, run.target_speedup) == (None, 2.0)
    assert run.head_epochs < run.epsilon_warmup == run.epochs // 10
    assert (run.self_distillation, run.aux_loss_weight) == (False, 0.0)
    plan = LearningRateSchedule(run)
    assert plan.lr(0, 0.0) == 0.02
    assert plan.lr(run.epochs - 1, 1.0) == pytest.approx(0.0)
    assert plan.decay_epoch == 12


def test_cifar10_fast_is_a_short_run_to_half_the_flops() -> None:
    run = recipe("cifar10-fast")
    assert (run.target_flops, run.batch_size) == (0.5, 512)
    assert 100 <= run.epochs <= 200
    plan = LearningRateSchedule(run)
    steps = DATASETS[run.dataset].train // run.batch_size
    rates = [plan.lr(epoch) for epoch in range(run.epochs)]
    assert max(rates) == pytest.approx(0.4, rel=0.02)
    assert rates.index(max(rates)) == run.lr_warmup
    assert rates[-1] < 1e-4
    assert plan.lr(0, 0.5 / steps) < 0.001
    assert run.epsilon_warmup == run.epochs // 10 < plan.decay_epoch == 90


@pytest.mark.parametrize(
    ("dataset", "pretrained", "expected"),
    [
        (None, False, "digits"),
        (None, True, "digits"),
        ("cifar10", True, "digits"),
        ("folder:pets", False, "images"),
        ("csv:pets.csv", False, "images"),
        ("hf:pets", True, "finetune"),
    ],
)
def test_what_a_run_without_a_recipe_gets(
    dataset: str | None, pretrained: bool, expected: str
) -> None:
    assert default(dataset, pretrained=pretrained) == expected


def test_images_prunes_a_network_that_has_begun_to_learn() -> None:
    run = recipe("images")
    assert (run.epsilon, run.target_parameters) == (None, 0.5)
    assert run.epsilon_warmup == run.epochs // 10


STEPPED = [name for name in RECIPES if isinstance(recipe(name).lr_schedule, tuple)]


@pytest.mark.parametrize("name", STEPPED)
def test_every_recipe_ends_on_its_lowest_rate_even_after_a_late_loss(name: str) -> None:
    run = recipe(name)
    plan = schedule(run)
    plan.observe(plan.decay_epoch - 2, 9.0)
    assert isinstance(run.lr_schedule, tuple)
    lowest = min(
        value for steps in (run.lr_schedule, run.lr_restart, run.final_decay) for _, value in steps
    )
    assert plan.lr(run.epochs - 1) == lowest


def test_an_unknown_recipe_is_refused_beside_the_known() -> None:
    with pytest.raises(ConfigError, match="--recipe cifar10: unknown; the recipes are: digits, f"):
        recipe("cifar10")
