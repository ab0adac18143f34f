"""Training a compact network on: the loop of eps-train, no gates, at a low rate."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eps_compact.analysis.importance import CPU, Answers, accuracy_drop, answer
from eps_core.errors import ConfigError
from eps_core.stats import Interval
from eps_train.config import TrainingConfig
from eps_train.data.dataset import Data
from eps_train.gating import rewriting
from eps_train.models.cifar import Normalize
from eps_train.models.spec import NetworkSpec
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import EpochMetrics, Score
from eps_train.training.forward import cpu_threads
from eps_train.training.trainer import Trainer

RATES = (0.1, 0.01)  # of the run's first rate: for two thirds of the epochs, and for the rest
SETTLING = 2 / 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetuned:
    """A compact network, trained on.

    Attributes:
        checkpoint: the network that was best on the validation part; plain, its `removed` blocks
            named in its network. Its metrics have the test part's score.
        removed: blocks taken out beyond the dead ones.
        epochs: that it was trained for.
        lr_schedule: the learning rates, the first and the last.
        whole: validation accuracy of the network that lost only its dead blocks (0..1).
        before, after: the same of the network without `removed`, and of it once trained on.
        drop_before, drop_after: points lost against `whole`, with Tango's 95 % intervals.
        test: accuracy and loss of the trained network on the test part.
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
        """Plain data, as JSON holds it; without the tensors."""
        kept = {name: getattr(self, name) for name in ("epochs", "whole", "before", "after")}
        return {
            **kept,
            "removed": list(self.removed),
            "lr_schedule": list(self.lr_schedule),
            "drop_before": asdict(self.drop_before),
            "drop_after": asdict(self.drop_after),
            "test": asdict(self.test),
            "samples": self.samples,
            "seconds": self.seconds,
        }


def without(checkpoint: Checkpoint, removed: Iterable[str]) -> NetworkSpec:
    """The checkpoint's network without gates, its dead blocks, and these besides.

    What `removed` takes out beyond the dead blocks is not lossless. Raises ConfigError for a block
    that the network has not got, or that is out already.
    """
    gone = (*checkpoint.network.removed, *checkpoint.dead)
    beyond = tuple(removed)
    live = set(checkpoint.network.all_blocks()).difference(gone)
    if unknown := sorted(set(beyond) - live):
        raise ConfigError(f"no live block named {', '.join(unknown)} to take out")
    return replace(checkpoint.network, gated=(), removed=(*gone, *beyond))


def finetune(
    checkpoint: Checkpoint,
    data: Data,
    removed: Iterable[str] = (),
    *,
    epochs: int,
    device: torch.device = CPU,
    report: Callable[[EpochMetrics], None] = lambda epoch: None,
) -> Finetuned:
    """Train the checkpoint's network on, without its dead blocks and without those in `removed`.

    Data, augmentation, batches, decay and seed are those of the checkpoint's own run. The rate is a
    tenth of that run's first, and a hundredth in the last third of the epochs; there is no side
    head.

    Args:
        checkpoint: as eps-train wrote it.
        data: the data it was trained on.
        removed: live blocks to take out, as a point of a sweep names them.
        epochs: to train for, 1 or more.
        device: where to train.
        report: told of every epoch.

    Raises:
        ConfigError: `epochs`, or a block that cannot be taken out.
        TrainingError: the numbers did not stay finite.
    """
    if epochs < 1:
        raise ConfigError(f"--finetune-epochs {epochs}: must be at least 1")
    beyond = tuple(removed)
    spec = without(checkpoint, beyond)
    config = tuning_config(TrainingConfig.from_dict(checkpoint.config), epochs, device)
    tuned, seconds = _trained(config, data, device, (spec, checkpoint.state), report)
    networks = (
        without(checkpoint, ()).build(checkpoint.state),
        spec.build(checkpoint.state),
        tuned.network.build(tuned.state),
    )
    whole, before, after = _answers(networks, data, device)
    return Finetuned(
        checkpoint=tuned,
        removed=beyond,
        epochs=epochs,
        lr_schedule=(config.lr_schedule[0][1], config.final_decay[0][1]),
        whole=whole.accuracy,
        before=before.accuracy,
        after=after.accuracy,
        drop_before=accuracy_drop(whole, before),
        drop_after=accuracy_drop(whole, after),
        test=Score(**tuned.metrics["test"]),
        samples=len(data.validation),
        seconds=seconds,
    )


def _trained(
    config: TrainingConfig,
    data: Data,
    device: torch.device,
    start: tuple[NetworkSpec, Mapping[str, Tensor]],
    report: Callable[[EpochMetrics], None],
) -> tuple[Checkpoint, float]:
    """The best checkpoint of a run from `start`, and the seconds of training."""
    with tempfile.TemporaryDirectory() as folder, cpu_threads(config.cpu_threads):
        trainer = Trainer(
            config,
            data,
            best_path=Path(folder) / "best.pt",
            last_path=Path(folder) / "last.pt",
            device=device,
            start=start,
        )
        return trainer.run(report), trainer.seconds


def _answers(networks: Iterable[nn.Module], data: Data, device: torch.device) -> list[Answers]:
    """What each says to the validation part."""
    normalize = Normalize.of(data.identity).to(device)
    validation = data.validation.to(device)
    return [
        answer(rewriting.drop_taps(network).to(device), normalize, validation)
        for network in networks
    ]


def tuning_config(config: TrainingConfig, epochs: int, device: torch.device) -> TrainingConfig:
    """The run that trains on what `config` made, without what belongs to gates and processes."""
    first = config.lr_schedule[0][1]
    return replace(
        config.baseline(),
        epochs=epochs,
        epsilon_warmup=0,
        freeze_gates_at=1.0,
        lr_schedule=((0, RATES[0] * first),),
        lr_restart=(),
        final_decay=((SETTLING, RATES[1] * first),),
        aux_loss_weight=0.0,
        precision=config.precision if device.type == "cuda" else "fp32",
        compile=False,
        sync_batchnorm=False,
        gate_scope="replica",
    )
