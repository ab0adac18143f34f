"""Steps that are replayed from a CUDA graph; what can be seen without a GPU.

There nothing is captured, but the same code runs: static buffers, warm-up, renewal.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eps_core.errors import ConfigError, TrainingError
from eps_train.training import step
from eps_train.training.distributed import ALONE, Group
from eps_train.training.step import WARM_UP, GraphedStep, cuda_graph_obstacle
from eps_train.training.trainer import Stopped, Trainer
from tests.train.runs import PRUNING, remove, trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GONE = "stages.0.1"


def static(run: Trainer, *, required: bool = False) -> GraphedStep:
    """Have `run` take its steps as on a GPU, but for the capture."""
    run.take_step = GraphedStep(run.training_step, CPU, required=required)
    return run.take_step


def state(run: Trainer) -> dict[str, Tensor]:
    momentum = {
        f"momentum {name}": run.optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in run.network.named_parameters()
    }
    return {name: t.clone() for name, t in (run.network.state_dict() | momentum).items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def epochs_with_a_removal(run: Trainer) -> dict[str, Tensor]:
    """Two epochs at different rates; a block is taken out between them."""
    run.run_epoch()
    remove(run, GONE)
    run.run_epoch()
    return state(run)


def test_weights_are_those_of_the_plain_step_over_a_removal(tmp_path: Path) -> None:
    short: dict[str, Any] = {
        "epochs": 2,
        "lr_schedule": ((0, 0.1), (1, 0.02)),
        "final_decay": (),
        "patience": 3,
    }
    plain, run = trainer(tmp_path, **short), trainer(tmp_path, **short)
    steps = static(run)
    assert_equal(epochs_with_a_removal(run), epochs_with_a_removal(plain))
    assert steps.captures == 2, "once for each structure"
    for ours, theirs in zip(run.optimizer.param_groups, plain.optimizer.param_groups, strict=True):
        assert isinstance(ours["lr"], Tensor)
        assert ours["lr"].item() == theirs["lr"], "rounded alike, so that a GPU computes alike"


def test_a_run_stopped_in_an_epoch_goes_on_exactly(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", epochs=2)
    static(whole)
    whole.run(lambda report: None)
    calls = iter(range(1, 1000))
    stopped = trainer(tmp_path / "stopped", epochs=2, stop=lambda: next(calls) == 20)
    static(stopped)
    with pytest.raises(Stopped):
        stopped.run(lambda report: None)
    again = trainer(tmp_path / "stopped", epochs=2)
    static(again)
    again.resume()
    again.run(lambda report: None)
    assert_equal(state(again), state(whole))


def test_a_new_threshold_needs_no_new_capture(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    steps = static(run)
    run.network.train()
    batches = run.batches.epoch(0, first=0)
    for epsilon, closed in ((0.0, 0), (1e9, 1), (0.0, 1)):
        for gate in run.pruner.gates.values():
            gate.set_epsilon(epsilon)
        for _ in range(WARM_UP + 1):
            steps(next(batches))
        assert {int(g.closed_steps) for g in run.pruner.gates.values()} == {closed * (WARM_UP + 1)}
    assert steps.captures == 1


class NoCapture:
    """Stands for torch.cuda.graph where the network does what a graph cannot."""

    def __enter__(self) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    def __exit__(self, *_: object) -> None: ...


class Generator:
    """torch's random numbers on a GPU, which a capture that fails leaves unable to draw."""

    state = "of the capture"

    def clone_state(self) -> str:
        return "a copy"

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state


def without_capture(run: Trainer, monkeypatch: pytest.MonkeyPatch, *, required: bool) -> Generator:
    steps, generator = static(run, required=required), Generator()
    monkeypatch.setattr(steps, "_stream", object())
    monkeypatch.setattr(steps, "_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(steps, "_eagerly", steps._take)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: NoCapture())
    return generator


def test_a_step_that_cannot_be_captured_is_taken_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short: dict[str, Any] = {"epochs": 1, "batch_size": 256}
    plain, run = trainer(tmp_path, **short), trainer(tmp_path, **short)
    generator = without_capture(run, monkeypatch, required=False)
    plain.run_epoch()
    with pytest.warns(UserWarning, match=r"no CUDA graph: a step .* \(operation not permitted"):
        run.run_epoch()
    assert_equal(state(run), state(plain))
    assert generator.state == "a copy", "dropout would raise"


def test_a_capture_that_was_asked_for_and_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, epochs=1)
    without_capture(run, monkeypatch, required=True)
    with pytest.raises(TrainingError, match=r"--cuda-graph on: .* stream is capturing\); leave it"):
        run.run_epoch()


class Several(Group):
    """A group of two processes, as far as the choice of a step looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.world = object()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("changes", "group", "device", "reason"),
    [
        ({}, ALONE, CUDA, None),
        ({"precision": "bf16"}, ALONE, CUDA, None),
        ({"precision": "fp16"}, ALONE, CUDA, "not with the loss scale of --precision fp16"),
        ({"compile": True}, ALONE, CUDA, "not with --compile"),
        ({}, Several(), CUDA, "not with several processes"),
        ({}, ALONE, CPU, "needs a CUDA device, not cpu"),
    ],
)
def test_where_there_is_no_graph_the_reason_is_said(
    changes: dict[str, Any], group: Group, device: torch.device, reason: str | None
) -> None:
    config = replace(PRUNING, **changes)
    assert cuda_graph_obstacle(config, group, device) == reason
    assert step.use_cuda_graph("auto", config, group, device) == (reason is None)
    assert not step.use_cuda_graph("off", config, group, device)
    if reason is None:
        assert step.use_cuda_graph("on", config, group, device)
    else:
        with pytest.raises(ConfigError, match=f"--cuda-graph on: {reason}; leave it out"):
            step.use_cuda_graph("on", config, group, device)
