"""Pruning beyond dead blocks: select a network of a sweep, cut a nested run, fine-tune."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from eps_compact.analysis.importance import CPU, accuracy_drop, evaluation_samples, predict
from eps_compact.analysis.sweep import STATISTICS, Goal, Point, Sweep, nested_network, pick, sweep
from eps_compact.certificate import as_json
from eps_core.cli import Log
from eps_core.errors import ConfigError
from eps_core.stats import Interval
from eps_train.config import TrainingConfig
from eps_train.data.dataset import Data
from eps_train.gating import rewriting
from eps_train.gating.costs import Timer
from eps_train.models.resnets import Normalize
from eps_train.models.spec import NetworkSpec
from eps_train.schedule import CosineDecay, initial_lr
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import EpochMetrics, Score, score
from eps_train.training.forward import cpu_threads
from eps_train.training.step import Teacher
from eps_train.training.trainer import Trainer

LEARNING_RATE = 1.0  # of fine-tuning, in units of the run's first; it falls to 0 along a cosine


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetuned:
    """A fine-tuned compact network.

    Attributes:
        checkpoint: the network that was best on the validation part; plain, with its `removed`
            blocks named in its network. Its metrics have the test part's score.
        removed: blocks removed beyond the dead ones.
        lr_schedule: the first learning rate and the last.
        whole: validation accuracy of the network that lost only its dead blocks (0..1).
        before, after: the same of the network without `removed`, before and after fine-tuning.
        drop_before, drop_after: points lost against `whole`, with Tango's 95 % intervals.
        test: the fine-tuned network on the test part.
        samples: images of the validation part.
        seconds: of training.
    """

    checkpoint: Checkpoint
    removed: tuple[str, ...]
    epochs: int
    lr_schedule: tuple[float, float]
    whole: float
    before: float
    after: float
    drop_before: Interval
    drop_after: Interval
    test: Score
    samples: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it, without the checkpoint."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        del values["checkpoint"]
        return cast(dict[str, Any], as_json(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The network to be compacted.

    Attributes:
        checkpoint: the given one, the one that was cut from a nested run, or the fine-tuned one.
        also: its live blocks to remove besides the dead ones.
        nested: how that one was cut: `removed` blocks, and the accuracy of the `whole` and of the
            `cut` network on `samples` held-out images; None: it was not.
        point: of the sweep, where one was selected.
    """

    checkpoint: Checkpoint
    also: tuple[str, ...] = ()
    nested: dict[str, Any] | None = None
    sweep: Sweep | None = None
    goal: Goal | None = None
    point: Point | None = None
    tuned: Finetuned | None = None

    @property
    def made(self) -> Literal["cut", "tuned"] | None:
        """How `checkpoint` was made of the given one; None: it is that."""
        if self.tuned is not None:
            return "tuned"
        return None if self.nested is None else "cut"

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of the certificate; empty when nothing was asked for."""
        entries: dict[str, Any] = {}
        if self.sweep is not None:
            goal = None
            if self.goal is not None and self.point is not None:
                goal = {"asked": asdict(self.goal), "point": self.sweep.points.index(self.point)}
            entries["sweep"] = {**self.sweep.to_dict(), "goal": goal}
        if self.nested is not None:
            entries["nested"] = self.nested
        if self.tuned is not None:
            entries["finetune"] = self.tuned.to_dict()
        return entries


def select(
    checkpoint: Checkpoint,
    data: Data,
    goal: Goal | None,
    *,
    samples: int,
    timer: Timer,
    device: torch.device,
    report: Log,
) -> Selection:
    """Sweep, and select the network that meets `goal`; of a nested run it is cut.

    Arguments and errors are those of :func:`sweep`. Raises ConfigError when no point of the sweep
    meets the goal, too.
    """
    swept = sweep(
        checkpoint, data, goal, samples=samples, timer=timer, device=device, report=report
    )
    if goal is None:
        return Selection(checkpoint=checkpoint, sweep=swept)
    point = pick(swept, goal)
    report(goal.describe(point))
    selection = Selection(checkpoint=checkpoint, sweep=swept, goal=goal, point=point)
    if not (swept.nested and point.removed):
        return replace(selection, also=point.removed)
    smaller = cut(checkpoint, data, point.removed, device)
    nested = {
        "removed": list(point.removed),
        "whole": checkpoint.metrics["validation"]["accuracy"],
        "cut": smaller.metrics["validation"]["accuracy"],
        "samples": smaller.metrics["validation"]["samples"],
        "test": smaller.metrics["test"],
    }
    return replace(selection, checkpoint=smaller, nested=nested)


def cut(
    checkpoint: Checkpoint, data: Data, removed: Collection[str], device: torch.device
) -> Checkpoint:
    """Return the checkpoint of a nested run without some of its blocks.

    It is a gated network of its own: the blocks that are left keep their gates and records, batch
    norms are estimated again on training images, and its metrics are those of this network.
    """
    normalize = Normalize.of(checkpoint.data).to(device)
    images = evaluation_samples(data.train, STATISTICS, device)
    network = nested_network(checkpoint.build_gated().eval().to(device), normalize, removed, images)
    scores = {
        name: asdict(score(network, normalize, part.to(device)))
        for name, part in (("validation", data.validation), ("test", data.test))
    }
    return replace(
        checkpoint,
        network=replace(
            checkpoint.network,
            gated=tuple(block for block in checkpoint.network.gated if block not in removed),
            removed=tuple(b for b in checkpoint.network.all_blocks() if b in removed),
        ),
        state=dict(network.cpu().state_dict()),
        gates=[record for record in checkpoint.gates if record.block not in removed],
        order=tuple(block for block in checkpoint.order if block not in removed),
        metrics={**checkpoint.metrics, **scores},
        side_head=None,
        resume=None,
        digest="",
    )


# -- Fine-tuning: the training loop of eps-train, without gates


def tune(
    selection: Selection,
    data: Data,
    *,
    epochs: int,
    teacher: Checkpoint,
    device: torch.device,
    report: Log,
) -> Selection:
    """Fine-tune a selected network; where that loses accuracy, the selection stays as it is."""

    def progress(epoch: EpochMetrics) -> None:
        report(
            f"fine-tuning, epoch {epoch.epoch}/{epochs}: loss {epoch.loss:.3f},"
            f" validation {epoch.validation.accuracy:.2%}"
        )

    start, removed = selection.checkpoint, selection.also
    tuned = finetune(
        start, data, removed, epochs=epochs, device=device, teacher=teacher, report=progress
    )
    if tuned.after < tuned.before:
        report(
            f"fine-tuning lost accuracy ({tuned.before:.2%} to {tuned.after:.2%} on held-out"
            " images): its result is discarded; give more --finetune-epochs, or none"
        )
        return selection
    return replace(selection, checkpoint=tuned.checkpoint, also=(), tuned=tuned)


def finetune(
    checkpoint: Checkpoint,
    data: Data,
    removed: Collection[str] = (),
    *,
    epochs: int,
    device: torch.device = CPU,
    teacher: Checkpoint | None = None,
    report: Callable[[EpochMetrics], None] = lambda epoch: None,
) -> Finetuned:
    """Fine-tune the checkpoint's network without its dead blocks and without those in `removed`.

    Data, augmentation, batches, decay and seed are those of the checkpoint's own run. The learning
    rate falls along a cosine from that run's first to 0; there is no side head. The network is
    distilled from that of the teacher, by default the checkpoint itself, without its dead blocks.

    Args:
        checkpoint: as eps-train wrote it.
        data: the data it was trained on.
        removed: live blocks to remove, as a point of a sweep names them.
        report: called after every epoch.

    Raises:
        ConfigError: there is no epoch.
        TrainingError: the loss did not stay finite.
    """
    if epochs < 1:
        raise ConfigError(f"--finetune-epochs {epochs}: must be at least 1")
    spec = without(checkpoint, removed)
    config = finetune_config(TrainingConfig.from_dict(checkpoint.config), epochs, device)
    with tempfile.TemporaryDirectory() as folder, cpu_threads(config.cpu_threads):
        trainer = Trainer(
            config,
            data,
            best_path=Path(folder) / "best.pt",
            last_path=Path(folder) / "last.pt",
            device=device,
            start=(spec, checkpoint.state),
            teacher=Teacher(teacher or checkpoint, device),
        )
        tuned = trainer.run(report)
    normalize = Normalize.of(data.identity).to(device)
    whole, before, after = (
        predict(rewriting.drop_taps(network).to(device), normalize, data.validation.to(device))
        for network in (
            without(checkpoint, ()).build(checkpoint.state),
            spec.build(checkpoint.state),
            tuned.network.build(tuned.state),
        )
    )
    return Finetuned(
        checkpoint=tuned,
        removed=tuple(removed),
        epochs=epochs,
        lr_schedule=(initial_lr(config.lr_schedule), 0.0),
        whole=whole.accuracy,
        before=before.accuracy,
        after=after.accuracy,
        drop_before=accuracy_drop(whole, before),
        drop_after=accuracy_drop(whole, after),
        test=Score(**tuned.metrics["test"]),
        samples=len(data.validation),
        seconds=trainer.seconds,
    )


def without(checkpoint: Checkpoint, removed: Collection[str]) -> NetworkSpec:
    """Return the checkpoint's network without gates, its dead blocks, and `removed`.

    Raises ConfigError for a block that the network does not have, or that is removed already.
    """
    gone = (*checkpoint.network.removed, *checkpoint.dead)
    live = set(checkpoint.network.all_blocks()).difference(gone)
    if unknown := sorted(set(removed) - live):
        raise ConfigError(f"no live block named {', '.join(unknown)} to remove")
    return replace(checkpoint.network, gated=(), removed=(*gone, *removed))


def finetune_config(config: TrainingConfig, epochs: int, device: torch.device) -> TrainingConfig:
    """Return the configuration of a fine-tuning run of what `config` trained, without gates."""
    return replace(
        config.baseline(),
        epochs=epochs,
        head_epochs=0,
        epsilon_warmup=0,
        freeze_gates_at=1.0,
        lr_schedule=CosineDecay(LEARNING_RATE * initial_lr(config.lr_schedule)),
        lr_warmup=0.0,
        lr_restart=(),
        final_decay=(),
        aux_loss_weight=0.0,
        ema=0.0,  # a few epochs are too short for an average
        precision=config.precision if device.type == "cuda" else "fp32",
        compile=False,
        sync_batchnorm=False,
        gate_scope="replica",
    )
