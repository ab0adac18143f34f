"""Fine-tuning of a compact network: the training loop of eps-train without gates."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from eps_compact.analysis.importance import CPU, accuracy_drop, predict
from eps_core.errors import ConfigError
from eps_core.stats import Interval
from eps_train.config import TrainingConfig
from eps_train.data.dataset import Data
from eps_train.gating import rewriting
from eps_train.models.resnets import Normalize
from eps_train.models.spec import NetworkSpec
from eps_train.schedule import CosineDecay, initial_lr
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import EpochMetrics, Score
from eps_train.training.forward import cpu_threads
from eps_train.training.step import Teacher
from eps_train.training.trainer import Trainer

LEARNING_RATE = 1.0  # of the run's first; from there it falls to 0 along a cosine


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetuned:
    """A fine-tuned compact network.

    Attributes:
        checkpoint: the network that was best on the validation part; plain, with its `removed`
            blocks named in its network. Its metrics have the test part's score.
        removed: blocks removed beyond the dead ones.
        epochs: of fine-tuning.
        lr_schedule: the learning rates, the first and the last.
        whole: validation accuracy of the network that lost only its dead blocks (0..1).
        before, after: the same of the network without `removed`, before and after fine-tuning.
        drop_before, drop_after: points lost against `whole`, with Tango's 95 % intervals.
        test: accuracy and loss of the fine-tuned network on the test part.
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
        names = [field.name for field in fields(self) if field.name != "checkpoint"]
        values = {name: getattr(self, name) for name in names}
        found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(values))
        return found


def without(checkpoint: Checkpoint, removed: Iterable[str]) -> NetworkSpec:
    """Return the checkpoint's network without gates, its dead blocks, and `removed`.

    What `removed` takes out beyond the dead blocks is not lossless. Raises ConfigError for a block
    that the network does not have, or that is removed already.
    """
    gone = (*checkpoint.network.removed, *checkpoint.dead)
    beyond = tuple(removed)
    live = set(checkpoint.network.all_blocks()).difference(gone)
    if unknown := sorted(set(beyond) - live):
        raise ConfigError(f"no live block named {', '.join(unknown)} to remove")
    return replace(checkpoint.network, gated=(), removed=(*gone, *beyond))


def finetune(
    checkpoint: Checkpoint,
    data: Data,
    removed: Iterable[str] = (),
    *,
    epochs: int,
    device: torch.device = CPU,
    teacher: Checkpoint | None = None,
    report: Callable[[EpochMetrics], None] = lambda epoch: None,
) -> Finetuned:
    """Fine-tune the checkpoint's network without its dead blocks and without those in `removed`.

    Data, augmentation, batches, decay and seed are those of the checkpoint's own run. The learning
    rate falls along a cosine from that run's first to 0; there is no side head. The network is
    distilled from the teacher's, without its dead blocks.

    Args:
        checkpoint: as eps-train wrote it.
        data: the data it was trained on.
        removed: live blocks to remove, as a point of a sweep names them.
        epochs: to train for, 1 or more.
        device: where to train.
        teacher: by default the checkpoint itself.
        report: called after every epoch.

    Raises:
        ConfigError: `epochs`, or a block that cannot be removed.
        TrainingError: the loss did not stay finite.
    """
    if epochs < 1:
        raise ConfigError(f"--finetune-epochs {epochs}: must be at least 1")
    beyond = tuple(removed)
    spec = without(checkpoint, beyond)
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
        removed=beyond,
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
