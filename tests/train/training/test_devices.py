from __future__ import annotations

import pytest
import torch

from eps_core.errors import ConfigError
from eps_train.training import forward


@pytest.fixture
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)


@pytest.fixture
def _torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")


def test_auto_is_cuda_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: int(there))
        assert forward.choose("auto").type == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "--device gpu: not a device; write auto, cpu, cuda, cuda:N or mps"),
        ("meta", "--device meta: not supported; write auto, cpu, cuda, cuda:N or mps"),
        ("cuda:2", "--device cuda:2: torch sees 2 CUDA devices here; use --device cpu"),
    ],
)
@pytest.mark.usefixtures("_two_gpus")
def test_a_device_that_is_not_there_is_one_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        forward.choose(name)


@pytest.mark.usefixtures("_two_gpus", "_torchrun")
def test_each_process_has_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forward.choose("auto") == forward.choose("cuda") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="gives each process a device of its own; write cuda"):
        forward.choose("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="started 4 processes, and torch sees 2 CUDA devices"):
        forward.choose("cuda")


def test_an_apple_gpu_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device mps: torch sees no Apple GPU here"):
        forward.choose("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert forward.choose("mps") == torch.device("mps")
    assert forward.wide_float(torch.device("mps")) == torch.float32
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    with pytest.raises(ConfigError, match="--device mps: only one process"):
        forward.choose("mps")
