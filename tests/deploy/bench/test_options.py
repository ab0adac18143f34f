"""What options of eps-bench reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eps_deploy.bench import latency as run_module
from eps_deploy.bench import subjects
from eps_deploy.bench.subjects import TorchSubject
from eps_deploy.cli.bench import main
from tests.commands import run


class Called(Exception):
    """What something was called with; it ends what called it."""

    def __init__(self, *args: object, **named: object) -> None:
        super().__init__(args, named)
        self.named = named


def call(*args: object, **named: object) -> Any:
    raise Called(*args, **named)


def bench(folder: Path, *args: object) -> None:
    result = run("eps-bench", main, *args, cwd=folder)
    assert result.code == 0, result.stderr


def test_onnx_runtime_runs_as_asked_for(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "open_session", call)
    with pytest.raises(Called) as caught:
        bench(deployed, "bundle/model.onnx", "--threads", 3, "--provider", "cuda")
    assert caught.value.named.items() >= {"threads": 3, "provider": "cuda"}.items()


def test_torch_has_so_many_threads(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    prepare = TorchSubject.call

    def counted(self: TorchSubject, batch: int) -> Any:
        once = prepare(self, batch)

        def call() -> Any:
            answer = once()
            counts.append(torch.get_num_threads())
            return answer

        return call

    monkeypatch.setattr(TorchSubject, "call", counted)
    before = torch.get_num_threads()
    try:
        bench(deployed, "compact.pt", "--threads", 3, "--batch", 1, "--seconds", 0)
    finally:
        torch.set_num_threads(before)
    assert set(counts) == {3}


def test_so_many_seconds_are_spent(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "interleave", call)
    with pytest.raises(Called) as caught:
        bench(deployed, "bundle/model.onnx", "--seconds", 0.5)
    assert caught.value.named["budget"] == 0.5
