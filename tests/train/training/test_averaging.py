"""The moving average of the weights: what it holds, who sees it, and that a run resumes with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eps_train.gating import rewriting
from eps_train.models.spec import NetworkSpec
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import score
from eps_train.training.step import AveragedWeights
from eps_train.training.trainer import Stopped
from tests.train.runs import digits, pruning_trainer

SPEC = NetworkSpec.parse("cifar:14x4", in_channels=1, classes=3)
WEIGHT, MEAN = "stem.0.weight", "stem.1.running_mean"


def test_it_is_the_moving_average_of_weights_and_statistics() -> None:
    model = SPEC.build()
    averaged = AveragedWeights(model, 0.75)
    expected = {name: model.state_dict()[name].clone() for name in (WEIGHT, MEAN)}
    for step in range(3):
        with torch.no_grad():
            model(torch.full((2, 1, 8, 8), 1.0 + step))  # moves the statistics
            model.get_parameter(WEIGHT).add_(step + 1)
        averaged.update()
        state = model.state_dict()
        expected = {n: 0.75 * tensor + 0.25 * state[n] for n, tensor in expected.items()}
    for name, tensor in expected.items():
        torch.testing.assert_close(averaged.tensors[name], tensor)
    assert not any(".gate." in name for name in averaged.tensors)


def test_it_is_put_in_place_for_a_while() -> None:
    model = SPEC.build()
    averaged = AveragedWeights(model, 0.5)
    with torch.no_grad():
        model.get_parameter(WEIGHT).add_(1)
    trained = model.get_parameter(WEIGHT).clone()
    with averaged.applied():
        assert torch.equal(model.get_parameter(WEIGHT), averaged.tensors[WEIGHT])
    assert torch.equal(model.get_parameter(WEIGHT), trained)


def test_a_removed_block_leaves_it() -> None:
    model = SPEC.build()
    averaged = AveragedWeights(model, 0.5)
    averaged.follow(rewriting.remove_blocks(model, ["stages.1.1"]))
    assert WEIGHT in averaged.tensors
    assert not any(name.startswith("stages.1.1.") for name in averaged.tensors)
    averaged.update()


def test_a_run_stopped_after_a_removal_ends_in_the_same_weights(tmp_path: Path) -> None:
    """The checkpoint holds the average, which was validated; training continues without it."""
    whole = pruning_trainer(tmp_path / "whole", epochs=5, ema=0.9)
    best = whole.run(lambda report: None)
    assert whole.pruner.tracker.dead == ("stages.0.1",)
    assert whole.averaged is not None
    last = Checkpoint.load(whole.last_path)
    assert torch.equal(last.state[WEIGHT], whole.averaged.tensors[WEIGHT])
    assert not torch.equal(last.state[WEIGHT], whole.model.get_parameter(WEIGHT))
    found = score(best.build_gated(), whole.normalize, digits().validation)
    assert found.accuracy == best.metrics["validation"]["accuracy"]

    steps = iter(range(1, 1000))
    stop_at = 4 * whole.batches.steps + 9  # in the last epoch, after the removal
    stopped = pruning_trainer(
        tmp_path / "stopped", epochs=5, ema=0.9, stop=lambda: next(steps) == stop_at
    )
    with pytest.raises(Stopped):
        stopped.run(lambda report: None)
    again = pruning_trainer(tmp_path / "stopped", epochs=5, ema=0.9)
    again.resume()
    assert again.step
    again.run(lambda report: None)
    resumed = Checkpoint.load(again.last_path)
    for name, tensor in last.state.items():
        assert torch.equal(resumed.state[name], tensor), name
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), name
