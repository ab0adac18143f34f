"""Fine-tuning: the same training loop, without gates, from the weights of the checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eps_compact.analysis.selection import finetune, finetune_config, without
from eps_compact.compaction import compact_checkpoint
from eps_core.errors import ConfigError
from eps_train import recipes
from eps_train.data import dataset
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import EpochMetrics
from eps_train.training.step import Teacher, distillation_loss
from tests.checkpoints import make_checkpoint

DIGITS = dataset.load("digits")
CPU = torch.device("cpu")
GONE = ("stages.2.1", "stages.2.2")


def trained(dead: tuple[str, ...] = ("stages.1.1",)) -> Checkpoint:
    """Random weights, and the configuration of a run that could have made them."""
    # Weight 0: a teacher of random weights would teach nothing.
    config = replace(recipes.digits(), model="cifar:20x4", patience=2, distillation_weight=0.0)
    return replace(make_checkpoint(dead=dead), config=config.to_dict())


def test_it_learns_from_the_checkpoints_weights() -> None:
    checkpoint = trained()
    told: list[EpochMetrics] = []
    done = finetune(checkpoint, DIGITS, GONE, epochs=3, report=told.append)
    assert [epoch.epoch for epoch in told] == [1, 2, 3]
    # The run's first learning rate, 0.1, falls along a cosine; the middle of each epoch is told.
    assert [epoch.lr for epoch in told] == pytest.approx([0.0933, 0.05, 0.0067], abs=1e-4)
    assert done.lr_schedule == pytest.approx((0.1, 0.0))
    assert done.after > done.before
    assert done.drop_after.value == pytest.approx(100 * (done.whole - done.after))
    assert done.drop_before.value == pytest.approx(100 * (done.whole - done.before))
    assert done.test.samples == len(DIGITS.test)
    assert done.samples == len(DIGITS.validation)
    network = done.checkpoint.network
    assert (network.gated, network.removed) == ((), ("stages.1.1", *GONE))
    assert not done.checkpoint.gates
    assert json.loads(json.dumps(done.to_dict(), allow_nan=False))["removed"] == list(GONE)


def test_its_teacher_is_the_unpruned_network() -> None:
    """With nothing but the teacher to learn from, the pruned network approaches it."""
    checkpoint = replace(trained(), digest="1234")
    checkpoint.config["distillation_weight"] = 1.0
    done = finetune(checkpoint, DIGITS, GONE, epochs=2)
    assert done.checkpoint.metrics["teacher"] == "1234"
    images = DIGITS.validation.images[:64]
    expected = Teacher(checkpoint, CPU)(images)
    apart = [
        distillation_loss(Teacher(each, CPU)(images), expected, 4.0).item()
        for each in (
            replace(checkpoint, network=without(checkpoint, GONE), gates=[]),
            done.checkpoint,
        )
    ]
    assert apart[1] < apart[0]


def test_it_starts_from_the_checkpoints_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate of almost zero, the weights stay; batch norm's statistics alone move."""
    monkeypatch.setattr("eps_compact.analysis.selection.LEARNING_RATE", 1e-12)
    checkpoint = trained()
    done = finetune(checkpoint, DIGITS, GONE, epochs=1)
    for name, tensor in done.checkpoint.state.items():
        if name.endswith("weight"):
            torch.testing.assert_close(tensor, checkpoint.state[name], atol=1e-6, rtol=0)
    assert not any(name.startswith(GONE) for name in done.checkpoint.state)


def test_what_comes_out_is_a_checkpoint_that_compacts_to_itself(tmp_path: Path) -> None:
    done = finetune(trained(), DIGITS, GONE, epochs=1)
    done.checkpoint.save(tmp_path / "tuned.pt")
    again = Checkpoint.load(tmp_path / "tuned.pt")
    compacted = compact_checkpoint(again, DIGITS.validation.images, checkpoint_path="tuned.pt")
    assert compacted.removed == ("stages.1.1", *GONE)


def test_blocks_that_cannot_be_removed_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^no live block named stages\.1\.1, stages\.9\.0 to"):
        without(trained(), ("stages.9.0", "stages.1.1", "stages.0.0"))


def test_no_epochs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--finetune-epochs 0: must be at least 1$"):
        finetune(trained(), DIGITS, epochs=0)


def test_the_run_is_that_of_the_checkpoint_without_gates_at_a_low_learning_rate() -> None:
    config = replace(
        recipes.digits(),
        epsilon=None,
        target_parameters=0.3,
        max_accuracy_drop=1.0,
        precision="bf16",
        compile=True,
    )
    tuned = finetune_config(config, 9, CPU)
    assert tuned.plain
    assert (tuned.aux_loss_weight, tuned.compile, tuned.precision) == (0.0, False, "fp32")
    assert tuned.weight_decay == config.weight_decay
    assert finetune_config(config, 9, torch.device("cuda")).precision == "bf16"


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    finetune(trained(), DIGITS, epochs=1)
    assert torch.get_num_threads() == before
