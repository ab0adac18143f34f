from __future__ import annotations

from dataclasses import replace

import pytest

from eps_train.recipes import digits
from eps_train.schedule import CosineDecay, LearningRateSchedule, value_at

RATES = ((0, 0.1), (4, 0.01))
RESTART = ((0, 0.1), (3, 0.01), (5, 0.001))


def schedule(**changes: object) -> LearningRateSchedule:
    fields = {
        "epochs": 20,
        "lr_schedule": RATES,
        "lr_restart": RESTART,
        "final_decay": ((0.8, 0.001),),
    }
    return LearningRateSchedule(replace(digits(), **{**fields, **changes}))  # type: ignore[arg-type]


def test_a_step_function_holds_until_its_next_step() -> None:
    assert [value_at(RATES, epoch) for epoch in range(6)] == [0.1] * 4 + [0.01] * 2


def test_rate_follows_the_first_table_until_a_block_is_lost() -> None:
    plan = schedule()
    assert [plan.lr(epoch) for epoch in range(16)] == [0.1] * 4 + [0.01] * 12


def test_rate_restarts_after_an_epoch_that_lost_a_block() -> None:
    plan = schedule()
    assert plan.observe(6, 1.0)
    assert [plan.lr(epoch) for epoch in range(7, 14)] == [0.1] * 3 + [0.01] * 2 + [0.001] * 2


def test_less_than_one_more_discarded_block_is_no_loss() -> None:
    plan = schedule()
    assert not plan.observe(2, 0.9)
    assert plan.observe(3, 1.4)
    assert not plan.observe(4, 2.3)
    assert plan.observe(5, 2.4)


def test_without_a_restart_table_the_rate_never_goes_back_up() -> None:
    plan = schedule(lr_restart=())
    assert plan.observe(6, 5.0)
    assert plan.lr(7) == 0.01


def test_the_last_descent_is_kept_free_of_restarts() -> None:
    plan = schedule()
    assert plan.decay_epoch == 16
    assert plan.observe(15, 3.0), "the loss itself is still noticed"
    assert [plan.lr(epoch) for epoch in range(16, 20)] == [0.001] * 4


@pytest.mark.parametrize("lost_in", range(20))
def test_no_run_ends_on_a_high_rate(lost_in: int) -> None:
    plan = schedule()
    plan.observe(lost_in, 9.0)
    assert plan.lr(19) == 0.001


def test_restored_schedule_goes_on_alike() -> None:
    plan, again = schedule(), schedule()
    plan.observe(6, 2.5)
    again.load_state_dict(plan.state_dict())
    assert [again.lr(epoch) for epoch in range(7, 20)] == [plan.lr(epoch) for epoch in range(7, 20)]
    assert again.observe(8, 3.4) == plan.observe(8, 3.4)


def test_a_cosine_falls_to_zero_over_the_run_and_pruning_ends_at_three_fifths() -> None:
    plan = schedule(lr_schedule=CosineDecay(0.2), lr_restart=(), final_decay=())
    assert plan.lr(0, 0.0) == 0.2
    assert plan.lr(10, 0.0) == pytest.approx(0.1)
    assert plan.lr(19, 1.0) == pytest.approx(0.0)
    assert plan.decay_epoch == 12
    plan.observe(6, 9.0)
    assert plan.lr(10, 0.0) == pytest.approx(0.1), "no restart"
    assert schedule(lr_schedule=CosineDecay(0.2), lr_restart=()).decay_epoch == 16


def test_the_warm_up_rises_from_zero_step_by_step() -> None:
    plan = schedule(lr_warmup=1.5)
    assert [plan.lr(0, done) for done in (0.0, 0.75)] == pytest.approx([0.0, 0.05])
    assert [plan.lr(1, done) for done in (0.2, 0.5)] == pytest.approx([0.08, 0.1])
