"""The batch size that a device chooses, as far as it can be seen without a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eps_core.errors import ConfigError
from eps_train.config import TrainingConfig
from eps_train.data.images import ImageSet
from eps_train.training import probe
from eps_train.training.probe import largest_batch, step_seconds
from eps_train.training.step import TrainingStep
from eps_train.training.trainer import network_spec
from tests.train.runs import PRUNING, digits

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = replace(PRUNING, model="cifar:8x4", ema=0.9)
OUTLINE = digits().identity.outline


def chosen(config: TrainingConfig, device: torch.device) -> int:
    return largest_batch(config, network_spec(config, OUTLINE), digits(), device)


def test_a_cpu_takes_the_recipes_batch_size() -> None:
    assert chosen(SMALL, CPU) == SMALL.batch_size


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes that were tried on a GPU, which has memory for batches up to the first number."""
    tried = [0]
    trial = probe._fits

    def step(self: TrainingStep, batch: ImageSet) -> Tensor:
        tried.append(len(batch))
        if len(batch) > tried[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(2)

    def on_cpu(config: Any, spec: Any, data: Any, device: torch.device) -> bool:
        return trial(config, spec, data, CPU)

    monkeypatch.setattr(TrainingStep, "__call__", step)
    monkeypatch.setattr(probe, "_fits", on_cpu)
    monkeypatch.setattr(probe, "_margin", lambda device: nullcontext())
    monkeypatch.setattr(probe, "LEAST_STEPS", 20)
    return tried


def test_a_batch_is_halved_until_it_fits(room: list[int]) -> None:
    room[0] = 40
    assert len(digits().train) // 20 in range(64, 128)
    assert chosen(SMALL, CUDA) == 32
    assert room[1:] == [64, 32, 32]


def test_a_device_without_room_is_one_line(room: list[int]) -> None:
    with pytest.raises(ConfigError, match="--batch-size auto: not even 8 images fit in the"):
        chosen(replace(SMALL, accumulate=4), CUDA)
    assert room[1:] == [64, 32, 16, 8]


def test_a_step_of_any_kind_is_timed() -> None:
    nested = replace(SMALL, model="cifar:14x4", epsilon=None, nested=True, accumulate=2)
    for config in (SMALL, nested):
        spec = network_spec(config, OUTLINE)
        assert 0 < step_seconds(config, spec, OUTLINE, CPU, flops=10**8) < 1e6
