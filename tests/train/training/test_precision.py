from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from eps_core.errors import ConfigError, TrainingError
from eps_train.training import forward
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import EpochMetrics, score
from eps_train.training.forward import TrainingPrecision
from eps_train.training.trainer import Stopped, Trainer
from tests.train.runs import PRUNED, digits, pruned_blocks, pruning_trainer, trainer

CPU = torch.device("cpu")


def can(name: str) -> bool:
    try:
        TrainingPrecision(name, CPU)
    except ConfigError:
        return False
    return True


HALVES = [
    pytest.param(name, marks=pytest.mark.skipif(not can(name), reason=f"no {name} on this CPU"))
    for name in ("bf16", "fp16")
]


def test_float32_is_real_float32_on_every_device() -> None:
    torch.set_float32_matmul_precision("high")
    TrainingPrecision("fp32", CPU)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


def test_tf32_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match=r"--precision tf32: a number format of CUDA devices"):
        TrainingPrecision("tf32", CPU)


def test_a_device_that_cannot_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError('"slow_conv2d" not implemented for Half\nand more')

    monkeypatch.setattr(torch, "conv2d", refuse)
    message = (
        r'--precision fp16: this cpu device cannot train in it \("slow_conv2d" not'
        r" implemented for 'Half'\); use fp32".replace("'", "")
    )
    with pytest.raises(ConfigError, match=message):
        TrainingPrecision("fp16", CPU)


def test_a_busy_device_is_not_taken_for_one_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "conv2d", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        TrainingPrecision("fp16", CPU)


def test_asking_for_a_precision_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    TrainingPrecision("bf16", CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", HALVES)
def test_blocks_die_and_all_that_is_kept_is_float32(tmp_path: Path, name: str) -> None:
    run = pruning_trainer(tmp_path, precision=name)
    reports: list[EpochMetrics] = []
    run.run(reports.append)
    assert pruned_blocks(reports) == PRUNED
    assert all(parameter.dtype == torch.float32 for parameter in run.network.parameters())
    checkpoint = Checkpoint.load(tmp_path / "ckpt.pt")
    floats = [t.dtype for t in checkpoint.state.values() if t.is_floating_point()]
    assert set(floats) == {torch.float32}
    # What was validated is the float32 network, as it ships.
    again = score(checkpoint.build_gated(), run.normalize, digits().validation)
    assert asdict(again) == checkpoint.metrics["validation"]


def test_the_forward_pass_of_a_step_is_in_the_chosen_type(tmp_path: Path) -> None:
    seen = []
    run = trainer(tmp_path, precision="bf16", epochs=1)
    block = run.model.get_submodule("stages.1.1.conv2")
    block.register_forward_hook(lambda module, args, output: seen.append((module.training, output)))
    run.run_epoch()
    assert {(training, output.dtype) for training, output in seen} == {
        (True, torch.bfloat16),
        (False, torch.float32),
    }


def test_tf32_is_allowed_in_the_steps_of_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward pass have it; validation, and the test at the end, do not."""
    monkeypatch.setattr(forward, "_require_precision", lambda name, device: None)
    run = trainer(tmp_path, model="cifar:8x4", precision="tf32", epochs=1)
    seen = set()

    def note(where: str) -> None:
        allowed = torch.backends.cudnn.allow_tf32
        seen.add((where, allowed, torch.get_float32_matmul_precision()))

    stem = run.model.get_submodule("stem.0")
    stem.register_forward_hook(
        lambda module, args, output: note("steps" if module.training else "validation")
    )
    run.model.get_parameter("stem.0.weight").register_hook(lambda gradient: note("steps"))
    run.run(lambda report: note("end"))
    assert seen == {
        ("steps", True, "high"),
        ("validation", False, "highest"),
        ("end", False, "highest"),
    }


# -- the loss scale --------------------------------------------------------------------------------

needs_fp16 = pytest.mark.skipif(not can("fp16"), reason="no fp16 on this CPU")


def scale(run: Trainer) -> float:
    return float(run.training_step.precision.state_dict()["scale"])


def set_scale(run: Trainer, value: float) -> None:
    precision = run.training_step.precision
    precision.load_state_dict(precision.state_dict() | {"scale": value})


@needs_fp16
def test_steps_that_the_loss_scale_leaves_out_are_no_failure(tmp_path: Path) -> None:
    """Also the very first ones: the optimizer's kernel would leave its momentum unset."""
    run = trainer(tmp_path, precision="fp16", epochs=1)
    set_scale(run, 2.0**40)
    before = [parameter.detach().clone() for parameter in run.network.parameters()]
    run.network.train()
    loss, _ = run.take_step(next(iter(run.batches.epoch(0, first=0))))
    assert bool(loss.isfinite())
    assert scale(run) == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, run.network.parameters(), strict=True))
    momentum = [run.optimizer.state[p]["momentum_buffer"] for p in run.network.parameters()]
    assert not any(bool(buffer.any()) for buffer in momentum)
    report = run.run_epoch()
    assert torch.tensor(report.loss).isfinite()
    assert scale(run) < 2.0**39
    assert all(bool(parameter.isfinite().all()) for parameter in run.network.parameters())


@needs_fp16
def test_gradients_that_no_scale_keeps_finite_stop_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, precision="fp16", epochs=1)
    set_scale(run, 2.0**-20)
    parameter = run.model.get_parameter("classifier.weight")
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match=r"epoch 1, step 13: gradients are not finite in fp16"):
        run.run_epoch()


@needs_fp16
@pytest.mark.parametrize("stop_after", [5, 20])
def test_a_resumed_run_has_the_scale_that_it_had(tmp_path: Path, stop_after: int) -> None:
    def fresh(folder: Path, **more: Any) -> Trainer:
        made = trainer(folder, precision="fp16", epochs=2, **more)
        set_scale(made, 2.0**30)  # so that it changes on the way
        return made

    whole = fresh(tmp_path / "whole")
    whole.run(lambda report: None)
    calls = iter(range(1, 1000))
    stopped = fresh(tmp_path / "stopped", stop=lambda: next(calls) == stop_after)
    with pytest.raises(Stopped):
        stopped.run(lambda report: None)
    again = trainer(tmp_path / "stopped", precision="fp16", epochs=2)
    again.resume()
    assert scale(again) == scale(stopped)
    again.run(lambda report: None)
    assert again.training_step.precision.state_dict() == whole.training_step.precision.state_dict()
    theirs = whole.network.state_dict()
    for name, tensor in again.network.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
