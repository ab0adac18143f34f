from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from eps_core.errors import ConfigError
from eps_train.gating import controller as module
from eps_train.gating.controller import EpsilonController
from eps_train.gating.costs import GROUP, Measure
from eps_train.gating.rewriting import removable
from eps_train.gating.targets import BlockCosts, Flops, Latency, Parameters, Target
from eps_train.training.checkpoint import Checkpoint, GateRecord, PruneRecord
from eps_train.training.step import Teacher
from eps_train.training.trainer import Stopped, Trainer
from tests.checkpoints import make_checkpoint
from tests.train.gating.timers import LayerTimer, timed_by
from tests.train.runs import PRUNING, trainer

TARGET = replace(PRUNING, epsilon=None, target_parameters=0.5, epsilon_warmup=1, epochs=8)


TO_40 = Parameters(0.4)
NO_BRAKE = 100.0  # a loss of accuracy that no network has: blocks go one after another all the same


def controller(
    max_accuracy_drop: float | None = None,
    *,
    target: Target = TO_40,
    blocks: Mapping[str, float] | None = None,
    **changes: Any,
) -> EpsilonController:
    """By default four blocks of 10 parameters in a network of 50, of which 20 are to stay."""
    blocks = blocks or dict.fromkeys("abcd", 10)
    made = EpsilonController(
        target=target,
        costs=BlockCosts(currency=target.currency, whole=50, blocks=blocks),
        epochs=10,
        end=9,
        patience=2,
        max_accuracy_drop=max_accuracy_drop,
        criterion="response",
        stages=dict.fromkeys(blocks, "all"),
    )
    return replace(made, **changes)


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
    made = controller(NO_BRAKE)
    assert made.threshold("b") == 0
    made.observe(0, records(PEAKS), kept=50, accuracy=0.8)  # 50 - 30/6 = 45 are wanted next: one
    assert made.chosen == {"b"}
    assert 1.0 < made.threshold("b") < 1.1, "just above its largest response"
    assert made.threshold("d") == 0


def test_the_least_important_block_goes_first() -> None:
    made = controller(NO_BRAKE)
    scores = {"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.4}
    made.observe(0, records(PEAKS), kept=50, accuracy=0.8, scores=scores)
    assert made.chosen == {"a"}
    assert 4.0 < made.threshold("a") < 4.3, "above its largest response all the same"
    made.observe(3, records(PEAKS), kept=50, accuracy=0.8, scores=scores)
    assert made.chosen == {"a", "d"}


def test_as_many_are_chosen_as_the_pace_asks_for() -> None:
    made = controller(NO_BRAKE)
    made.observe(3, records(PEAKS), kept=50, accuracy=0.8)  # 50 - 30 * 4/6 = 30 are wanted: two
    assert made.chosen == {"b", "d"}
    assert made.epsilon > 2.0
    made.observe(3, records(PEAKS), kept=50, accuracy=0.8)
    assert made.chosen == {"b", "d"}, "those that are on their way count as gone"


def test_without_a_limit_to_the_accuracy_lost_all_are_chosen_within_a_tenth_of_the_run() -> None:
    made = controller(epochs=30, end=18)
    made.observe(1, records(PEAKS), kept=50, accuracy=0.8)
    assert not made.chosen, "a tenth of the run is for learning"
    for epoch, blocks in ((2, "b"), (3, "bd"), (4, "bdc")):  # 40, 30, 20 of 50 are wanted
        made.observe(epoch, records(PEAKS), kept=50, accuracy=0.1)
        assert made.chosen == set(blocks)
    short = controller(epochs=10, end=6)
    short.observe(0, records(PEAKS), kept=50, accuracy=0.8)
    assert short.chosen == {"b", "c", "d"}


def test_epsilon_stays_above_a_chosen_block_that_grows_and_never_falls() -> None:
    made = controller()
    made.observe(0, records(PEAKS), kept=50, accuracy=0.8)
    made.observe(1, records({**PEAKS, "b": 1.5}), kept=50, accuracy=0.8)
    risen = made.threshold("b")
    assert risen > 1.5
    made.observe(1, records({**PEAKS, "b": 0.2}), kept=50, accuracy=0.8)
    assert made.threshold("b") == risen


def test_opens_all_gates_once_the_target_is_met() -> None:
    made = controller()
    made.observe(5, records(PEAKS), kept=50, accuracy=0.8)
    made.observe(6, records(PEAKS, dead="bdc"), kept=20, accuracy=0.8)
    assert [made.threshold(block) for block in "abcd"] == [0, 0, 0, 0]


def test_in_the_final_decay_none_is_chosen_but_the_chosen_die() -> None:
    made = controller(NO_BRAKE)
    made.observe(0, records(PEAKS), kept=50, accuracy=0.8)
    made.observe(8, records(PEAKS), kept=50, accuracy=0.8)
    assert made.chosen == {"b"}
    assert made.threshold("b") > 1.0


def test_every_stage_keeps_a_block() -> None:
    made = controller(
        target=Parameters(0.2),
        blocks=dict.fromkeys(("one.0", "one.1", "two.0"), 10),
        stages={"one.0": "one", "one.1": "one", "two.0": "two"},
    )
    made.observe(3, records({"one.0": 1.0, "one.1": 2.0, "two.0": 0.1}), kept=50, accuracy=0.8)
    assert made.chosen == {"one.0"}, "the target asks for more"


def test_stages_lose_the_same_share_of_their_blocks() -> None:
    """Four and two blocks: two and one go, however important the others are."""
    peaks = {"one.0": 0.4, "one.1": 0.1, "one.2": 0.2, "one.3": 0.3, "two.0": 9.0, "two.1": 8.0}
    stages = {block: block.partition(".")[0] for block in peaks}
    made = controller(
        target=Parameters(0.4), blocks=dict.fromkeys(peaks, 10), stages=stages, epochs=30, end=29
    )
    for epoch, block in ((2, "one.1"), (3, "two.1"), (4, "one.2")):  # each asks for one more
        made.observe(epoch, records(peaks), kept=50, accuracy=0.8)
        assert block in made.chosen
        assert len(made.chosen) == epoch - 1


def test_towards_a_latency_the_block_goes_that_costs_least_importance_for_a_millisecond() -> None:
    blocks = {"a": 20.0, "b": 4.0, "c": 1.0, "d": 5.0}  # 4/20, 1/4, 3/1 and 2/5
    made = controller(NO_BRAKE, target=Latency(0.9), blocks=blocks)
    made.observe(0, records(PEAKS), kept=50, accuracy=0.8)
    assert made.chosen == {"a"}, "the strongest response, and most of the time"
    plain = controller(NO_BRAKE, target=Latency(0.9), blocks=blocks, criterion="random")
    plain.observe(0, records(PEAKS), kept=50, accuracy=0.8)
    assert plain.chosen == {"b"}


def test_of_equal_importance_the_block_goes_that_costs_most() -> None:
    made = controller(target=Flops(0.9), blocks={"a": 5, "b": 8, "c": 6, "d": 7})
    made.observe(0, records(dict.fromkeys("abcd", 0.0)), kept=50, accuracy=0.8)
    assert made.chosen == {"b"}


def test_a_block_that_saves_nothing_is_never_chosen() -> None:
    """Not even where the target cannot be reached; it is what its stage keeps."""
    made = controller(target=Latency(0.1), blocks={"a": 10, "b": 0.0, "c": 10, "d": 0.0})
    made.observe(7, records(PEAKS), kept=50, accuracy=0.8)
    assert made.chosen == {"a", "c"}


def test_the_guard_chooses_none_until_accuracy_is_back() -> None:
    made = controller(max_accuracy_drop=1.0)
    for epoch, accuracy in enumerate([0.90, 0.80, 0.85]):
        made.observe(epoch, records(PEAKS), kept=50, accuracy=accuracy)
    assert (made.held, len(made.chosen)) == (0, 2), "one weak epoch is noise"
    made.observe(3, records(PEAKS), kept=50, accuracy=0.88)
    made.observe(4, records(PEAKS), kept=50, accuracy=0.85)
    assert (made.held, len(made.chosen)) == (1, 2), "three in a row are not"
    made.observe(5, records(PEAKS), kept=50, accuracy=0.895)
    assert (made.held, len(made.chosen)) == (1, 3)


def test_a_target_that_was_missed_is_told_with_its_reason() -> None:
    made = controller(max_accuracy_drop=1.0)
    assert made.shortfall(20) is None
    assert made.shortfall(25) == (
        "50.0% of the parameters are left, not 40.0%: the run was too short, or every stage is down"
        " to a block; give more --epochs"
    )
    latency = controller(target=Latency(0.4))
    assert str(latency.shortfall(25)).startswith("50.0% of the latency is left, not 40.0%: ")
    made.held = 2
    assert "in 2 epochs accuracy was too low" in str(made.shortfall(25))


@contextmanager
def certain_deaths() -> Iterator[None]:
    """Epsilon so far above the responses of the chosen blocks that no step opens their gates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MARGIN", 1e6)
        yield


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[float]]:
    """A run to its end without a stop, and epsilon in each of its epochs."""
    run = trainer(tmp_path_factory.mktemp("whole_run"), TARGET)
    epsilons: list[float] = []
    with certain_deaths():
        run.run(lambda report: epsilons.append(report.epsilon))
    return run, epsilons


def test_a_run_reaches_its_target(whole_run: tuple[Trainer, list[float]]) -> None:
    run, epsilons = whole_run
    assert epsilons[0] == 0, "nothing is closed before anything is learned"
    assert max(epsilons) > 0
    assert epsilons[-1] == 0, "what ships is what was trained last"
    best = Checkpoint.load(run.best_path)
    assert best.dead
    parameters = sum(p.numel() for p in best.network.skeleton().parameters())
    assert run.parameters() <= 0.5 * parameters


def test_resumes_exactly_while_epsilon_is_led(
    whole_run: tuple[Trainer, list[float]], tmp_path: Path
) -> None:
    resumed = []
    for _ in range(2):
        run = trainer(tmp_path, TARGET)
        if run.last_path.exists():
            run.resume()
        for _ in range(TARGET.epochs // 2):
            with certain_deaths():
                report = run.run_epoch()
            resumed.append(report.epsilon)
            run.save(report)
    assert resumed == whole_run[1]


def test_a_run_resumes_exactly_with_a_criterion_and_a_teacher(tmp_path: Path) -> None:
    """Stopped in the middle of an epoch: the measurements of its first half count too."""
    run = replace(TARGET, criterion="gradient", epochs=4)
    teacher = Teacher(make_checkpoint(depth=8), torch.device("cpu"))
    whole = trainer(tmp_path / "whole", run, teacher=teacher)
    whole.run(lambda report: None)
    steps = whole.batches.steps
    calls = iter(range(10_000))
    folder = tmp_path / "stopped"
    first = trainer(folder, run, teacher=teacher, stop=lambda: next(calls) == steps + steps // 2)
    with pytest.raises(Stopped):
        first.run(lambda report: None)
    again = trainer(folder, run, teacher=teacher)
    again.resume()
    assert again.step
    again.run(lambda report: None)
    theirs = whole.model.state_dict()
    assert again.model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in again.model.state_dict().items())


def test_a_random_criterion_prunes_in_the_order_of_its_seed(tmp_path: Path) -> None:
    run = trainer(tmp_path, TARGET, criterion="random", seed=5)
    run.run_epoch()
    assert run.pruner.controller is not None
    assert run.pruner.scores is not None
    order = run.pruner.scores.read()
    ranked = removable(sorted(order, key=order.__getitem__), order, run.pruner.stages)
    assert run.pruner.controller.chosen
    assert run.pruner.controller.chosen == set(ranked[: len(run.pruner.controller.chosen)])


class Unsteady(LayerTimer):
    """Each time it is loaded, blocks take other times."""

    loaded = 0

    def load(self, model: fx.GraphModule, image: Tensor) -> Measure:
        type(self).loaded += 1
        return super().load(model, image)

    def _time(self, network: nn.Module) -> float:
        time = super()._time(network)
        return time + time * time * self.loaded


def test_a_run_towards_a_latency_resumes_exactly_with_the_times_it_began_with(
    tmp_path: Path,
) -> None:
    """Stopped in the middle of its second epoch, and resumed where nothing can be timed."""
    timer = EntryPoint("ort", f"{__name__}:{Unsteady.__name__}", GROUP)
    run = replace(TARGET, target_parameters=None, target_latency=0.6, timer="ort")
    run = replace(run, model="cifar:14x4", batch_size=256, epochs=6)
    with certain_deaths(), timed_by(timer):
        Unsteady.loaded = 0
        whole = trainer(tmp_path / "whole", run)
        whole.run(lambda report: None)
        assert Unsteady.loaded == 1
        Unsteady.loaded = 0
        calls = iter(range(10_000))
        middle = whole.batches.steps + whole.batches.steps // 2
        first = trainer(tmp_path / "stopped", run, stop=lambda: next(calls) == middle)
        with pytest.raises(Stopped):
            first.run(lambda report: None)
        assert first.epoch == 1
    with certain_deaths(), timed_by():
        again = trainer(tmp_path / "stopped", run)
        with pytest.raises(ConfigError, match=r"^--timer ort: this installation"):
            again.measure_latency()
        again.resume()
        again.measure_latency()
        again.run(lambda report: None)
    assert whole.pruner.controller is not None
    assert again.pruner.controller is not None
    assert again.pruner.controller.costs == whole.pruner.controller.costs
    assert again.pruner.tracker.dead == whole.pruner.tracker.dead != ()
    theirs = whole.model.state_dict()
    assert again.model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in again.model.state_dict().items())
