"""A training run small enough for tests, in which blocks really die: digits, depth 20, width 4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from eps_train import data, recipes
from eps_train.config import TrainingConfig
from eps_train.data import Data
from eps_train.distributed import ALONE, Group
from eps_train.loop import Trainer

# Of its 9 blocks, the first dies at the end of epoch 4 and the last two at the end of epoch 6.
DYING = replace(
    recipes.digits(),
    model="cifar:20x4",
    epochs=7,
    batch_size=32,
    epsilon=3.0,
    descent=((0.9, 0.01),),
)


@cache
def digits() -> Data:
    return data.load("digits")


def trainer(
    folder: Path,
    run: TrainingConfig = DYING,
    *,
    stop: Callable[[], bool] = lambda: False,
    group: Group = ALONE,
    **changes: Any,
) -> Trainer:
    return Trainer(
        replace(run, **changes),
        digits(),
        best_path=folder / "ckpt.pt",
        last_path=folder / "last.pt",
        device=torch.device("cpu"),
        stop=stop,
        group=group,
    )
