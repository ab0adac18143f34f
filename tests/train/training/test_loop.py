from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eps_core import checksummed
from eps_core.errors import ConfigError, TrainingError
from eps_train.gating import rewriting
from eps_train.schedule import CosineDecay
from eps_train.training.checkpoint import FORMAT, VERSION, Checkpoint
from eps_train.training.evaluate import EpochMetrics, score
from eps_train.training.trainer import Stopped, Trainer
from tests.train.runs import PRUNED, PRUNING, SHUT, digits, pruned_blocks, pruning_trainer, trainer

REZERO: dict[str, Any] = {"model": "tests.train.smooth:ReZero", "aux_loss_weight": 0.0}


@pytest.fixture(scope="module")
def pruned_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[EpochMetrics], Trainer]:
    """One whole run in which blocks die; its files, epoch reports and trainer."""
    folder = tmp_path_factory.mktemp("pruned")
    reports: list[EpochMetrics] = []
    finished = pruning_trainer(folder)
    finished.run(reports.append)
    return folder, reports, finished


def test_blocks_die_and_leave_the_running_network(
    pruned_run: tuple[Path, list[EpochMetrics], Trainer],
) -> None:
    _, reports, finished = pruned_run
    died = pruned_blocks(reports)
    assert died == PRUNED
    assert not set(died) & rewriting.gates(finished.model).keys()
    assert not any(name.startswith(tuple(died)) for name in finished.model.state_dict())


def test_every_death_carries_its_evidence(
    pruned_run: tuple[Path, list[EpochMetrics], Trainer],
) -> None:
    folder, _, _ = pruned_run
    steps = digits().identity.sizes["train"] // PRUNING.batch_size
    checkpoint = Checkpoint.load(folder / "ckpt.pt")
    found = {record.block: record.death for record in checkpoint.gates if record.death is not None}
    assert {block: death.epoch for block, death in found.items()} == PRUNED
    for death in found.values():
        assert death.steps == PRUNING.patience * steps
        assert death.epsilon == SHUT
        assert 0 < death.peak < SHUT
        assert 0 < death.heldout_peak < SHUT
        assert death.samples == digits().identity.sizes["validation"]


def test_blocks_die_of_themselves(tmp_path: Path) -> None:
    """The only test that waits for it; all others force it.

    From each of 12 seeds a block was dead by epoch 5. That none is by epoch 12, from any of three
    seeds, is a fault and not bad luck.
    """
    found = []
    for seed in range(3):
        run = trainer(
            tmp_path, model="cifar:14x4", epsilon=4.5, epochs=12, seed=seed, batch_size=32
        )
        with suppress(TrainingError):  # a whole stage at once
            while not run.pruner.tracker.dead and run.epoch < run.config.epochs:
                run.run_epoch()
        found += [record.death for record in run.pruner.tracker.records.values() if record.death]
        if found:
            break
    assert found
    for death in found:
        assert 0 < death.peak <= death.epsilon == 4.5
        assert 0 < death.heldout_peak < death.epsilon


def test_live_removal_changes_nothing_that_survives(
    pruned_run: tuple[Path, list[EpochMetrics], Trainer], tmp_path: Path
) -> None:
    """Loss and every tensor of the surviving part equal those of a run that keeps the branches."""
    _, reports, finished = pruned_run
    kept_reports: list[EpochMetrics] = []
    keeping = pruning_trainer(tmp_path, live_removal=False)
    keeping.run(kept_reports.append)
    assert [r.died for r in kept_reports] == [r.died for r in reports]
    assert [r.loss for r in kept_reports] == [r.loss for r in reports]
    assert [r.validation for r in kept_reports] == [r.validation for r in reports]
    theirs = keeping.model.state_dict()
    for name, tensor in finished.model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert len(theirs) > len(finished.model.state_dict())
    assert finished.side_head is not None
    assert keeping.side_head is not None
    for name, tensor in finished.side_head.state_dict().items():
        assert torch.equal(tensor, keeping.side_head.state_dict()[name]), name


def test_checkpoint_is_the_best_since_the_last_block_was_lost(
    pruned_run: tuple[Path, list[EpochMetrics], Trainer],
) -> None:
    folder, reports, finished = pruned_run
    last_loss = max(report.epoch for report in reports if report.died)
    since = [report for report in reports if report.epoch >= last_loss]
    checkpoint = Checkpoint.load(folder / "ckpt.pt")
    assert checkpoint.metrics["validation"]["accuracy"] == max(r.validation.accuracy for r in since)
    assert checkpoint.dead == finished.pruner.tracker.dead


def test_checkpoint_reproduces_its_recorded_accuracies(
    pruned_run: tuple[Path, list[EpochMetrics], Trainer],
) -> None:
    """Gated network with dead gates shut and live gates open: exactly what was validated."""
    folder, _, finished = pruned_run
    checkpoint = Checkpoint.load(folder / "ckpt.pt")
    model = checkpoint.build_gated()
    for part, images in (("validation", digits().validation), ("test", digits().test)):
        measured = score(model, finished.normalize, images)
        assert measured.accuracy == checkpoint.metrics[part]["accuracy"], part


def test_weights_of_dead_blocks_stay_in_the_checkpoint(
    pruned_run: tuple[Path, list[EpochMetrics], Trainer],
) -> None:
    folder, _, finished = pruned_run
    checkpoint = Checkpoint.load(folder / "last.pt")
    full = finished.spec.build().state_dict()
    assert checkpoint.state.keys() == full.keys()
    assert checkpoint.network.removed == ()


@pytest.mark.parametrize("stop_after", [1, 4, 6])
def test_resumed_run_ends_in_the_same_weights(
    pruned_run: tuple[Path, list[EpochMetrics], Trainer], tmp_path: Path, stop_after: int
) -> None:
    """Stopped before, right at, and after the epochs in which blocks died."""
    _, reports, finished = pruned_run
    first = pruning_trainer(tmp_path)
    for _ in range(stop_after):
        first.save(first.run_epoch())
    again = pruning_trainer(tmp_path)
    again.resume()
    later: list[EpochMetrics] = []
    checkpoint = again.run(later.append)
    assert [r.loss for r in later] == [r.loss for r in reports[stop_after:]]
    assert [r.gates for r in later] == [r.gates for r in reports[stop_after:]]
    _assert_equal(again.model.state_dict(), finished.model.state_dict())
    whole = Checkpoint.load(finished.best_path)
    _assert_equal(checkpoint.state, whole.state)
    assert checkpoint.gates == whole.gates
    assert checkpoint.metrics["test"] == whole.metrics["test"]


def test_resuming_a_finished_run_changes_nothing(
    pruned_run: tuple[Path, list[EpochMetrics], Trainer], tmp_path: Path
) -> None:
    folder, _, _ = pruned_run
    for name in ("ckpt.pt", "last.pt"):
        shutil.copy(folder / name, tmp_path / name)
    before = (tmp_path / "ckpt.pt").read_bytes()
    again = pruning_trainer(tmp_path)
    again.resume()
    again.run(lambda report: pytest.fail("no epoch was left to train"))
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    pruning_trainer(tmp_path, epochs=1).run(lambda report: None)
    with pytest.raises(
        ConfigError, match=r"last\.pt: belongs to a run with epsilon 3\.0, not 2\.5"
    ):
        trainer(tmp_path, epochs=1, epsilon=2.5).resume()


def test_a_longer_run_follows_a_longer_cosine(tmp_path: Path) -> None:
    cosine: dict[str, Any] = {"lr_schedule": CosineDecay(0.1), "final_decay": ()}
    first = trainer(tmp_path, epochs=1, **cosine)
    first.save(first.run_epoch())
    told = trainer(tmp_path, epochs=3, **cosine).resume()
    assert told[-1].startswith("the learning rate follows the cosine of the longer run")


def test_a_state_of_an_older_version_is_refused_and_its_network_is_read(
    pruned_run: tuple[Path, list[EpochMetrics], Trainer], tmp_path: Path
) -> None:
    folder, _, finished = pruned_run
    payload, _ = checksummed.read(folder / "last.pt", format=FORMAT, version=VERSION)
    checksummed.write(tmp_path / "last.pt", {**payload, "version": 1})
    with pytest.raises(ConfigError, match=r"last\.pt: .* of an older eps-resnet .* start anew"):
        pruning_trainer(tmp_path).resume()
    assert Checkpoint.load(tmp_path / "last.pt").dead == finished.pruner.tracker.dead


def test_epsilon_zero_trains_a_network_without_gates(tmp_path: Path) -> None:
    plain = trainer(tmp_path, epsilon=0.0, epochs=1)
    report = plain.run_epoch()
    assert report.gates == ()
    assert not rewriting.gates(plain.model)
    assert not any("gate" in name for name in plain.model.state_dict())


def test_plain_and_gated_twins_start_from_the_same_weights(tmp_path: Path) -> None:
    plain, gated = trainer(tmp_path, epsilon=0.0), trainer(tmp_path)
    weights = dict(gated.model.named_parameters())
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_only_weights_of_convolutions_and_linear_layers_decay(tmp_path: Path) -> None:
    built = trainer(tmp_path)
    decaying = {
        id(parameter)
        for group in built.optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    assert built.side_head is not None
    for root in (built.model, built.side_head):
        for module in root.modules():
            weighted = isinstance(module, (nn.Conv2d, nn.Linear))
            for name, parameter in module.named_parameters(recurse=False):
                assert (id(parameter) in decaying) == (weighted and name == "weight")


@pytest.mark.parametrize("changes", [{}, REZERO], ids=["cifar", "rezero"])
def test_every_parameter_is_in_exactly_one_group(tmp_path: Path, changes: dict[str, Any]) -> None:
    built = trainer(tmp_path, **changes)
    groups = [id(p) for group in built.optimizer.param_groups for p in group["params"]]
    assert sorted(groups) == sorted(id(p) for p in built.network.parameters() if p.requires_grad)


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_a_scale_without_dimensions_is_trained(tmp_path: Path, epsilon: float) -> None:
    """And without decay; a branch whose scale stays at zero would die, whatever it could learn."""
    run = trainer(tmp_path, **REZERO, epsilon=epsilon, epsilon_warmup=1, epochs=2)
    run.save(run.run_epoch())
    scales = [run.model.get_parameter(name).item() for name in ("first", "second")]
    assert all(scales)
    again = trainer(tmp_path, **REZERO, epsilon=epsilon, epsilon_warmup=1, epochs=2)
    again.resume()
    assert [again.model.get_parameter(name).item() for name in ("first", "second")] == scales
    for made in (run, again):
        made.run_epoch()
    assert torch.equal(run.model.get_parameter("first"), again.model.get_parameter("first"))


def test_non_finite_response_stops_the_run_and_names_block_and_step(tmp_path: Path) -> None:
    broken = trainer(tmp_path)
    broken.save(broken.run_epoch())
    kept = (tmp_path / "last.pt").read_bytes()
    calls = 0

    def poison(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        nonlocal calls
        calls += 1
        return output * float("nan") if calls == 3 else None

    broken.model.get_submodule("stages.1.1.conv2").register_forward_hook(poison)
    message = r"epoch 2, step 3: block stages\.1\.1 is no longer finite.*last\.pt keeps the epoch"
    with pytest.raises(TrainingError, match=message):
        broken.run_epoch()
    assert (tmp_path / "last.pt").read_bytes() == kept


def test_a_stage_that_dies_before_learning_stops_the_run(tmp_path: Path) -> None:
    hopeless = trainer(tmp_path, epsilon=1e6)
    with pytest.raises(TrainingError, match=r"every block of stages\.0, .* lower --epsilon"):
        hopeless.run(lambda report: None)


def test_epsilon_acts_from_its_epoch_until_the_network_settles(tmp_path: Path) -> None:
    scheduled = trainer(tmp_path, epochs=10, epsilon_warmup=2, freeze_gates_at=0.8)
    thresholds = [set(scheduled.pruner.thresholds(epoch).values()) for epoch in range(10)]
    assert thresholds == [{0.0}] * 2 + [{3.0}] * 6 + [{0.0}] * 2


def test_no_block_dies_while_epsilon_does_not_act(tmp_path: Path) -> None:
    waiting = trainer(tmp_path, epsilon=1e6, epsilon_warmup=3, epochs=3)
    reports: list[EpochMetrics] = []
    waiting.run(reports.append)
    assert all(report.discarded == 0 and not report.died for report in reports)


def test_candidate_that_held_out_images_contradict_stays_alive(tmp_path: Path) -> None:
    """A closed training record is not enough: the held-out response must be below epsilon too."""
    built = trainer(tmp_path, replace(PRUNING, epsilon=1e-6))
    built.run_epoch()
    pruner, block = built.pruner, "stages.1.1"
    for _ in range(PRUNING.patience):
        pruner.step()
        for gate in pruner.gates.values():
            gate.steps.fill_(20)
        pruner.gates[block].closed_steps.fill_(20)
        judged = pruner.judge_epoch([built.normalize(built.validation.images)])
        assert judged.died == ()
    assert not bool(pruner.gates[block].dead)
    assert block in rewriting.gates(built.model)


def _assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("steps", [1, 14, 43, 66])
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_exactly(
    pruned_run: tuple[Path, list[EpochMetrics], Trainer], tmp_path: Path, steps: int
) -> None:
    """Of 13 steps an epoch: in the first, before, between and after the removals."""
    _, reports, finished = pruned_run
    taken = 0

    def stop() -> bool:
        nonlocal taken
        taken += 1
        return taken >= steps

    first = pruning_trainer(tmp_path, stop=stop)
    seen: list[EpochMetrics] = []
    with pytest.raises(Stopped):
        first.run(seen.append)
    assert first.step
    again = pruning_trainer(tmp_path)
    again.resume()
    assert again.step == first.step
    again.run(seen.append)
    assert [r.loss for r in seen] == [r.loss for r in reports]
    assert [r.gates for r in seen] == [r.gates for r in reports]
    _assert_equal(again.model.state_dict(), finished.model.state_dict())


def test_dropout_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Networks that draw random numbers of their own in training draw the same ones."""

    def dropping(folder: Path, stop_at: int) -> Trainer:
        calls = iter(range(1, 1000))
        made = trainer(folder, epochs=2, stop=lambda: next(calls) == stop_at)
        made.model.get_submodule("stem.2").register_forward_hook(
            lambda module, args, output: nn.functional.dropout(output, 0.5, module.training)
        )
        return made

    whole = dropping(tmp_path / "whole", stop_at=0)
    whole.run(lambda report: None)
    stopped = dropping(tmp_path / "stopped", stop_at=7)
    with pytest.raises(Stopped):
        stopped.run(lambda report: None)
    again = dropping(tmp_path / "stopped", stop_at=0)
    again.resume()
    again.run(lambda report: None)
    _assert_equal(again.model.state_dict(), whole.model.state_dict())
