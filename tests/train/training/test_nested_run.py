"""A nested run: sub-networks of every depth are trained with the network; nothing else moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eps_core.errors import ConfigError
from eps_train.cli import main
from eps_train.gating.nested import SubNetworks
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.trainer import Stopped, Trainer
from tests.commands import run
from tests.train.runs import PRUNING, trainer

NESTED = replace(PRUNING, model="cifar:14x4", epsilon=None, nested=True, epochs=3)


def sub_networks(run: Trainer) -> SubNetworks | None:
    return run.training_step.sub_networks


def test_the_order_is_fixed_after_the_first_epochs_and_trained_from_then_on(tmp_path: Path) -> None:
    nested = trainer(tmp_path / "nested", NESTED, epsilon_warmup=2, epochs=4)
    alone = trainer(tmp_path / "alone", NESTED, nested=False, epsilon=0.5, freeze_gates_at=0.0)
    for epoch in range(3):
        assert (sub_networks(nested) is None) == (epoch < 2)
        losses = [each.run_epoch().loss for each in (nested, alone)]
        assert (losses[0] == losses[1]) == (epoch < 2)
        if epoch < 2:
            theirs = alone.model.state_dict()
            for name, parameter in nested.model.named_parameters():
                assert torch.equal(parameter, theirs[name]), name
    assert sorted(nested.order) == sorted(nested.pruner.gates)
    peaks = [nested.pruner.tracker.records[block].peak for block in nested.order[3:]]
    assert peaks == sorted(peaks, reverse=True) or len(set(nested.order[:3])) == 3
    networks = sub_networks(nested)
    assert networks is not None
    assert networks.smallest == 3, "a block of each stage"


def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_exactly(tmp_path: Path) -> None:
    config = replace(NESTED, criterion="gradient")
    whole = trainer(tmp_path / "whole", config)
    whole.run(lambda report: None)
    for steps in (5, 20):  # before the order is fixed, and after
        calls = iter(range(1, 10_000))
        folder = tmp_path / str(steps)

        def stop(calls: Any = calls, last: int = steps) -> bool:
            return bool(next(calls) == last)

        with pytest.raises(Stopped):
            trainer(folder, config, stop=stop).run(lambda report: None)
        again = trainer(folder, config)
        again.resume()
        assert again.step
        again.run(lambda report: None)
        assert again.order == whole.order
        theirs = whole.model.state_dict()
        for name, tensor in again.model.state_dict().items():
            assert torch.equal(tensor, theirs[name]), name
    saved = Checkpoint.load(tmp_path / "whole" / "ckpt.pt")
    assert saved.order == whole.order
    assert not saved.dead


def test_the_command_saves_the_order(tmp_path: Path) -> None:
    options = ("--model", "cifar:14x4", "--epochs", 2, "--batch-size", 256, "--nested")
    found = run("eps-train", main, *options, cwd=tmp_path)
    assert found.code == 0, found.stderr
    checkpoint = Checkpoint.load(tmp_path / "ckpt.pt")
    assert sorted(checkpoint.order) == sorted(checkpoint.network.gated)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--model", "cifar:8x4"), "--nested: cifar:8x4 has no block that a sub-network could"),
        (("--epsilon", 2), "--nested and --epsilon contradict each other"),
        (("--target-parameters", 0.5), "--nested and --target-parameters contradict each other"),
        (("--compile",), "--nested: not with --compile"),
    ],
)
def test_what_cannot_be_nested_is_refused(
    options: tuple[object, ...], reason: str, tmp_path: Path
) -> None:
    refused = run("eps-train", main, "--nested", *options, cwd=tmp_path)
    assert refused.code == 1
    assert reason in refused.error
    assert not list(tmp_path.glob("*.pt"))


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = trainer(tmp_path, NESTED)
    monkeypatch.setattr(built.group, "world", object(), raising=False)
    with pytest.raises(ConfigError, match="not with several processes"):
        built._require_nestable()
