"""Phases of fine-tuning: the head alone, the whole network, pruning with itself as the teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eps_core.errors import ConfigError
from eps_train.training.step import GraphedStep
from eps_train.training.trainer import Stopped, Trainer
from tests.train.runs import PruningTrainer, pruning_trainer, trainer

PHASES: dict[str, Any] = {
    "epochs": 5,
    "head_epochs": 1,
    "epsilon_warmup": 2,
    "self_distillation": True,
    "distillation_weight": 0.9,
    "aux_loss_weight": 0.0,
}


def weights(run: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def changed(before: dict[str, Tensor], run: Trainer) -> set[str]:
    return {name for name, tensor in weights(run).items() if not torch.equal(tensor, before[name])}


def graphed(run: Trainer) -> Trainer:
    """Have `run` take its steps as on a GPU, but for the capture."""
    run.take_step = GraphedStep(run.training_step, torch.device("cpu"))
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A finished run with all phases, in which a block is removed."""
    run = pruning_trainer(tmp_path_factory.mktemp("whole"), **PHASES)
    start = weights(run)
    run.save(run.run_epoch())
    assert changed(start, run) == {"classifier.weight", "classifier.bias"}
    run.save(run.run_epoch())
    assert changed(start, run) == start.keys()
    assert run.own_teacher is None
    before = run.model.state_dict() | weights(run)
    run.save(run.run_epoch())
    teacher = run.own_teacher
    assert teacher is not None
    assert all(torch.equal(teacher.state[name], before[name]) for name in weights(run))
    run.run(lambda report: None)
    assert run.own_teacher is teacher
    return run


def test_a_teacher_changes_the_weights(whole: Trainer, tmp_path: Path) -> None:
    alone = pruning_trainer(tmp_path, **PHASES | {"self_distillation": False})
    alone.run(lambda report: None)
    assert whole.pruner.tracker.dead == alone.pruner.tracker.dead == ("stages.0.1",)
    assert changed(weights(whole), alone)


@pytest.mark.parametrize(
    ("epoch", "kind"), [(0, graphed), (4, lambda run: run)], ids=["graphed", "eager"]
)
def test_a_run_stopped_in_a_phase_goes_on_exactly(
    whole: Trainer, tmp_path: Path, epoch: int, kind: Callable[[Trainer], Trainer]
) -> None:
    steps = iter(range(1, 1000))
    stop_at = epoch * whole.batches.steps + 7
    stopped = kind(pruning_trainer(tmp_path, **PHASES, stop=lambda: next(steps) == stop_at))
    with pytest.raises(Stopped):
        stopped.run(lambda report: None)
    again = kind(pruning_trainer(tmp_path, **PHASES))
    again.resume()
    again.run(lambda report: None)
    assert isinstance(again, PruningTrainer)
    assert not changed(weights(whole), again)


def test_with_a_target_it_is_taught_from_the_epoch_that_may_choose(tmp_path: Path) -> None:
    target: dict[str, Any] = {"epsilon": None, "target_parameters": 0.5, "epsilon_warmup": 1}
    run = trainer(tmp_path, self_distillation=True, **target)
    run.run_epoch()
    assert run.own_teacher is None
    run.run_epoch()
    assert run.own_teacher is not None


def test_a_network_without_a_last_layer_has_no_head(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--head-epochs: tests\.train\.smooth:Headless does not"):
        trainer(tmp_path, model="tests.train.smooth:Headless", head_epochs=1, epsilon_warmup=2)
