"""Options of eps-bench reach what they configure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eps_deploy.bench import latency, model_files
from eps_deploy.bench.model_files import TorchEngine
from eps_deploy.cli.bench import main
from eps_deploy.engines.base import Images, Logits
from tests.commands import run


class Called(Exception):
    """Raised with the arguments of a call."""

    def __init__(self, *args: object, **named: object) -> None:
        super().__init__(args, named)
        self.named = named


def call(*args: object, **named: object) -> Any:
    raise Called(*args, **named)


def bench(folder: Path, *args: object) -> None:
    result = run("eps-bench", main, *args, cwd=folder)
    assert result.code == 0, result.stderr


def test_onnx_runtime_runs_as_asked_for(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "open_session", call)
    with pytest.raises(Called) as caught:
        bench(deployed, "bundle/model.onnx", "--threads", 3, "--provider", "cuda")
    assert caught.value.named.items() >= {"threads": 3, "provider": "cuda"}.items()


def test_torch_has_so_many_threads(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    infer = TorchEngine.infer

    def counted(self: TorchEngine, images: Images) -> Logits:
        logits = infer(self, images)
        counts.append(torch.get_num_threads())
        return logits

    monkeypatch.setattr(TorchEngine, "infer", counted)
    before = torch.get_num_threads()
    try:
        bench(deployed, "compact.pt", "--threads", 3, "--batch", 1, "--time-budget", 0)
    finally:
        torch.set_num_threads(before)
    assert set(counts) == {3}


def test_the_time_budget_is_spent(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "interleave", call)
    with pytest.raises(Called) as caught:
        bench(deployed, "bundle/model.onnx", "--time-budget", 0.5)
    assert caught.value.named["budget"] == 0.5
