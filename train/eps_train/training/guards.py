"""When a run must not go on: each check raises one line that says what happened and what helps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from eps_core.errors import ConfigError, TrainingError
from eps_train.config import TrainingConfig
from eps_train.data.dataset import Data
from eps_train.gating.gate import EpsilonGate
from eps_train.gating.pruning_state import nonfinite_block
from eps_train.training.checkpoint import Checkpoint, GateRecord
from eps_train.training.distributed import ALONE, Group
from eps_train.training.evaluate import Score


def nonfinite(
    gates: dict[str, EpsilonGate], *, epoch: int, step: int, kept: str, group: Group = ALONE
) -> TrainingError:
    """The error for a loss that is no longer finite at a 1-based `step` of the 1-based `epoch`.

    It names the first block that went wrong, which may have been some steps earlier, in any process
    of `group`; `kept` says what the user still has.
    """
    order = list(gates)
    culprits = [found for found in group.gather(nonfinite_block(gates)) if found is not None]
    culprit = min(culprits, key=lambda found: (found[1], order.index(found[0])), default=None)
    where = (
        f"step {step}: the loss" if culprit is None else f"step {culprit[1]}: block {culprit[0]}"
    )
    return TrainingError(
        f"epoch {epoch}, {where} is no longer finite; lower the learning rate{kept}"
    )


def refuse_collapse(
    records: Iterable[GateRecord],
    validation: Score,
    data: Data,
    *,
    epoch: int,
    stages: Mapping[str, str],
) -> None:
    """A stage that is gone before the network has learned anything will not come back.

    "Learned" is a validation accuracy half-way from the share of the largest class to 1; `stages`
    as `rewriting.stages` has them. Raises TrainingError.
    """
    labels = data.validation.labels
    chance = labels.bincount().max().item() / len(labels)
    if validation.accuracy >= (1 + chance) / 2:
        return
    if lost := lost_stages(records, stages):
        raise TrainingError(
            f"every block of {', '.join(lost)} died by epoch {epoch}, at a validation accuracy of"
            f" {validation.accuracy:.1%}: the threshold acts before the network has learned;"
            " lower --epsilon, or let it act later with --epsilon-warmup"
        )


def lost_stages(records: Iterable[GateRecord], stages: Mapping[str, str]) -> list[str]:
    """The stages of which every block has died, in the order of computation."""
    alive: dict[str, int] = {}
    for record in records:
        stage = stages.get(record.block, record.block)
        alive[stage] = alive.get(stage, 0) + (record.death is None)
    return [stage for stage, count in alive.items() if not count]


def unscalable(*, epoch: int, step: int, kept: str) -> TrainingError:
    """The error for fp16 gradients that no loss scale keeps finite."""
    return TrainingError(
        f"epoch {epoch}, step {step}: gradients are not finite in fp16 at any loss scale;"
        f" use --precision bf16 or fp32{kept}"
    )


def refuse_other_run(path: Path, last: Checkpoint, config: TrainingConfig, data: Data) -> None:
    """Raise ConfigError unless `last`, read from `path`, belongs to this configuration and data.

    Three things may differ: the images of the test part, which the run has not looked at; how the
    folder of the same images is written; and the number of epochs, which may grow.
    """
    part = last.data.changed_part(data.identity)
    if part not in (None, "test"):
        which = "" if part == "data" else f" (its {part} part differs)"
        raise ConfigError(
            f"{path}: was trained on other data{which}; resume with the same data options, or name"
            " where the original data lies with --data-root"
        )
    theirs, ours = last.config, config.to_dict()
    if unknown := sorted(theirs.keys() - ours.keys()):
        raise ConfigError(
            f"{path}: written by an earlier version of eps-train, whose configuration had the field"
            f" {unknown[0]}; resume it with that version, or start anew in another --output folder"
        )
    for name in sorted(ours.keys() | theirs.keys()):
        old, new = theirs.get(name), ours.get(name)
        if old == new or (name == "dataset" and last.data.may_be(config.dataset)):
            continue
        if name == "epochs" and isinstance(old, int) and isinstance(new, int) and old < new:
            continue
        raise ConfigError(
            f"{path}: belongs to a run with {name} {old}, not {new};"
            " resume with the same options, or start anew in another --output folder"
        )


def changes(path: Path, last: Checkpoint, config: TrainingConfig, data: Data) -> list[str]:
    """What a resumed run, which :func:`refuse_other_run` let pass, does otherwise than before."""
    told = []
    if last.data.changed_part(data.identity) == "test":
        told.append(
            f"{path}: the images of the test part have changed since; those of training and"
            " validation are the same"
        )
    before = last.config["epochs"]
    if before != config.epochs:
        told.append(f"{path}: the run was to have {before} epochs, and goes on to {config.epochs}")
        told += _later(config, before)
    return told


def _later(config: TrainingConfig, before: int) -> list[str]:
    """What depends on the share of the run that is over, and comes later in a longer run."""
    told = []
    if config.final_decay:
        share = config.final_decay[0][0]
        old, new = round(share * before) + 1, round(share * config.epochs) + 1
        told.append(f"the last descent of the rate begins in epoch {new}, not {old}")
    if config.freeze_gates_at < 1:
        old, new = (
            round(config.freeze_gates_at * before) + 1,
            round(config.freeze_gates_at * config.epochs) + 1,
        )
        told.append(f"live gates stay open from epoch {new} on, not {old}")
    if config.target_parameters is not None:
        told.append("epsilon is led to the target along the longer run")
    return told


def refuse_other_count(path: Path, theirs: int, ours: int) -> None:
    """Raise ConfigError when another number of processes is to go on with a run.

    Each has its own share of the batch, judges by it, and draws random numbers of its own.
    """
    if theirs != ours:
        raise ConfigError(
            f"{path}: belongs to a run of {theirs} processes, not {ours};"
            f" resume with torchrun --nproc-per-node {theirs}, or without it for one process"
        )


# -- What the training loop tells about an epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochMetrics:
    """What one epoch brought; every figure is of the network that would ship after it.

    Attributes:
        epoch: 1-based.
        rate, epsilon: learning rate and threshold of the epoch.
        loss, train_accuracy: means over the epoch's steps, in training mode.
        validation: on the held-out part, dead blocks out, live gates open.
        discarded: blocks that did not act, averaged over the steps (dead ones count as 1).
        died: blocks latched at the end of this epoch.
        gates: all gates' records after this epoch.
        parameters: learned parameters left in the network, dead blocks gone.
        best: whether `ckpt.pt` was written.
        seconds: wall time, saving not included.
        images: training images seen.
    """

    epoch: int
    rate: float
    epsilon: float
    loss: float
    train_accuracy: float
    validation: Score
    discarded: float
    died: tuple[str, ...]
    gates: tuple[GateRecord, ...]
    parameters: int
    best: bool
    seconds: float
    images: int
