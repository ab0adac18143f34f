from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from eps_train.gating import target as lead_module
from eps_train.gating.target import EpsilonController
from eps_train.training.checkpoint import Checkpoint, GateRecord, PruneRecord
from eps_train.training.trainer import Trainer
from tests.train.runs import DYING, trainer

LED = replace(DYING, epsilon=None, target_parameters=0.5, epsilon_warmup=1, epochs=8)


def lead(max_drop: float | None = None) -> EpsilonController:
    """Four blocks of 10 parameters in a network of 50, of which 20 are to stay."""
    sizes = dict.fromkeys("abcd", 10)
    return EpsilonController(
        target=20,
        sizes=sizes,
        whole=50,
        start=1,
        end=9,
        closing=2,
        max_drop=max_drop,
        stages=dict.fromkeys("abcd", "all"),
    )


def records(peaks: dict[str, float], dead: str = "") -> list[GateRecord]:
    death = PruneRecord(epoch=1, epsilon=1.0, steps=1, peak=0.5, heldout_peak=0.5, samples=1)
    return [
        GateRecord(
            block=block,
            epsilon=1.0,
            steps=10,
            closed_steps=0,
            peak=peak,
            death=death if block in dead else None,
        )
        for block, peak in peaks.items()
    ]


PEAKS = {"a": 4.0, "b": 1.0, "c": 3.0, "d": 2.0}


def test_the_weakest_block_goes_first_and_the_others_stay_open() -> None:
    led = lead()
    assert led.threshold("b") == 0
    led.observe(0, records(PEAKS), kept=50, accuracy=0.8)  # 50 - 30/6 = 45 are wanted next: one
    assert led.chosen == {"b"}
    assert 1.0 < led.threshold("b") < 1.1, "just above its largest response"
    assert led.threshold("d") == 0


def test_as_many_are_chosen_as_the_pace_asks_for() -> None:
    led = lead()
    led.observe(3, records(PEAKS), kept=50, accuracy=0.8)  # 50 - 30 * 4/6 = 30 are wanted: two
    assert led.chosen == {"b", "d"}
    assert led.epsilon > 2.0
    led.observe(3, records(PEAKS), kept=50, accuracy=0.8)
    assert led.chosen == {"b", "d"}, "those that are on their way count as gone"


def test_epsilon_stays_above_a_chosen_block_that_grows_and_never_falls() -> None:
    led = lead()
    led.observe(0, records(PEAKS), kept=50, accuracy=0.8)
    led.observe(1, records({**PEAKS, "b": 1.5}), kept=50, accuracy=0.8)
    risen = led.threshold("b")
    assert risen > 1.5
    led.observe(1, records({**PEAKS, "b": 0.2}), kept=50, accuracy=0.8)
    assert led.threshold("b") == risen


def test_opens_all_gates_once_the_target_is_met() -> None:
    led = lead()
    led.observe(5, records(PEAKS), kept=50, accuracy=0.8)
    led.observe(6, records(PEAKS, dead="bdc"), kept=20, accuracy=0.8)
    assert [led.threshold(block) for block in "abcd"] == [0, 0, 0, 0]


def test_the_last_descent_begins_with_nothing_new_but_lets_the_chosen_die() -> None:
    led = lead()
    led.observe(0, records(PEAKS), kept=50, accuracy=0.8)
    led.observe(8, records(PEAKS), kept=50, accuracy=0.8)
    assert led.chosen == {"b"}
    assert led.threshold("b") > 1.0


def test_every_stage_keeps_a_block() -> None:
    led = EpsilonController(
        target=10,
        sizes=dict.fromkeys(("one.0", "one.1", "two.0"), 10),
        whole=50,
        start=1,
        end=6,
        closing=2,
        max_drop=None,
        stages={"one.0": "one", "one.1": "one", "two.0": "two"},
    )
    led.observe(3, records({"one.0": 1.0, "one.1": 2.0, "two.0": 0.1}), kept=50, accuracy=0.8)
    assert led.chosen == {"one.0"}, "the target asks for more"


def test_the_guard_chooses_none_until_accuracy_is_back() -> None:
    led = lead(max_drop=0.01)
    for epoch, accuracy in enumerate([0.90, 0.80, 0.85]):
        led.observe(epoch, records(PEAKS), kept=50, accuracy=accuracy)
    assert (led.held, len(led.chosen)) == (0, 2), "one weak epoch is noise"
    led.observe(3, records(PEAKS), kept=50, accuracy=0.88)
    led.observe(4, records(PEAKS), kept=50, accuracy=0.85)
    assert (led.held, len(led.chosen)) == (1, 2), "three in a row are not"
    led.observe(5, records(PEAKS), kept=50, accuracy=0.895)
    assert (led.held, len(led.chosen)) == (1, 3)


def test_a_target_that_was_missed_is_told_with_its_reason() -> None:
    led = lead(max_drop=0.01)
    assert led.shortfall(20) is None
    assert led.shortfall(25) == (
        "50% of the parameters are left, not 40%: the run was too short, or every stage is down"
        " to a block; give more --epochs"
    )
    led.held = 2
    assert "in 2 epochs accuracy was too far down" in str(led.shortfall(25))


@contextmanager
def certain_deaths() -> Iterator[None]:
    """Epsilon so far above the responses of the chosen blocks that no step opens their gates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lead_module, "MARGIN", 1e6)
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[float]]:
    """A run to its end without a stop, and epsilon in each of its epochs."""
    run = trainer(tmp_path_factory.mktemp("straight"), LED)
    epsilons: list[float] = []
    with certain_deaths():
        run.run(lambda report: epsilons.append(report.epsilon))
    return run, epsilons


def test_a_run_reaches_its_target(straight: tuple[Trainer, list[float]]) -> None:
    run, epsilons = straight
    assert epsilons[0] == 0, "nothing is closed before anything is learned"
    assert max(epsilons) > 0
    assert epsilons[-1] == 0, "what ships is what was trained last"
    best = Checkpoint.load(run.best_path)
    assert best.dead
    whole = sum(p.numel() for p in best.network.skeleton().parameters())
    assert run.parameters() <= 0.5 * whole


def test_resumes_exactly_while_epsilon_is_led(
    straight: tuple[Trainer, list[float]], tmp_path: Path
) -> None:
    resumed = []
    for _ in range(2):
        run = trainer(tmp_path, LED)
        if run.last_path.exists():
            run.resume()
        for _ in range(LED.epochs // 2):
            with certain_deaths():
                report = run.run_epoch()
            resumed.append(report.epsilon)
            run.save(report)
    assert resumed == straight[1]
