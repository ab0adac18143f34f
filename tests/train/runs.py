"""Training runs small enough for tests, with and without pruning: digits, depth 20, width 4."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from eps_train import recipes
from eps_train.config import TrainingConfig
from eps_train.data import dataset
from eps_train.data.dataset import Data
from eps_train.gating.pruner import GraphPruner
from eps_train.training.distributed import ALONE, Group
from eps_train.training.evaluate import EpochMetrics
from eps_train.training.step import Teacher
from eps_train.training.trainer import Trainer

# Which of its 9 blocks die, and when, depends on the last bits of what the CPU or GPU computes.
# A test of what pruning does takes `pruning_trainer`; `trainer` is for all that it does not touch.
PRUNING = replace(
    recipes.digits(),
    model="cifar:20x4",
    epochs=7,
    batch_size=96,  # 13 steps an epoch
    epsilon=3.0,
    final_decay=((0.9, 0.01),),
)

# Not stages.1.2, whose output the side head reads as well: in the backward pass its removal changes
# the order in which three gradients are added, and with it their last bits.
PRUNED = {"stages.0.1": 4, "stages.1.1": 6, "stages.2.2": 6}  # block -> its last epoch, 1-based
SHUT = 1e9  # epsilon above every response that is finite


class ForcedPruner(GraphPruner):
    """A pruner by which the blocks of PRUNED die, at the end of these epochs, and no others.

    Their gates are shut for `patience` epochs before, and all other gates are open.
    Counting, confirmation on held-out images, removal and saving are the pruner's own.
    """

    def thresholds(self, epoch: int) -> dict[str, float]:
        first = {block: last - self.tracker.patience for block, last in PRUNED.items()}
        return {
            block: SHUT if epoch >= first.get(block, epoch + 1) else 0.0 for block in self.gates
        }


class PruningTrainer(Trainer):
    pruner_type = ForcedPruner


@cache
def digits() -> Data:
    return dataset.load("digits")


def trainer(
    folder: Path,
    run: TrainingConfig = PRUNING,
    *,
    kind: type[Trainer] = Trainer,
    device: str = "cpu",
    stop: Callable[[], bool] = lambda: False,
    group: Group = ALONE,
    cuda_graph: str = "auto",
    teacher: Teacher | None = None,
    **changes: Any,
) -> Trainer:
    """A trainer of `run` on digits, with `changes` to it, whose files are in `folder`."""
    return kind(
        replace(run, **changes),
        digits(),
        best_path=folder / "ckpt.pt",
        last_path=folder / "last.pt",
        device=torch.device(device),
        stop=stop,
        group=group,
        cuda_graph=cuda_graph,
        teacher=teacher,
    )


def pruned_blocks(reports: Iterable[EpochMetrics]) -> dict[str, int]:
    """The blocks that died, with the 1-based epoch; PRUNED for a whole run of `pruning_trainer`."""
    return {block: report.epoch for report in reports for block in report.died}


def remove(run: Trainer, *blocks: str) -> None:
    """Take blocks out of a running network between two steps."""
    run.pruner._remove(blocks, [run.optimizer])
    run.take_step.rewrap()


def pruning_trainer(folder: Path, run: TrainingConfig = PRUNING, **options: Any) -> Trainer:
    """Like :func:`trainer`; the blocks of PRUNED die in its run, on whatever machine."""
    return trainer(folder, run, kind=PruningTrainer, **options)
