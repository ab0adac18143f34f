"""What only a GPU can show; skipped, and listed as skipped, where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eps_train.checkpoint import Checkpoint
from eps_train.epoch_report import EpochReport
from eps_train.evaluate import logits
from eps_train.gate import EpsilonGate, relu_gate
from eps_train.loop import Trainer
from tests.train.runs import DYING, digits

pytestmark = pytest.mark.gpu


def trainer(folder: Path) -> Trainer:
    return Trainer(
        replace(DYING, cpu_threads=0),
        digits(),
        best_path=folder / "ckpt.pt",
        last_path=folder / "last.pt",
        device=torch.device("cuda"),
    )


def test_blocks_die_and_the_checkpoint_answers_alike_on_the_cpu(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    reports: list[EpochReport] = []
    run.run(reports.append)
    assert any(report.died for report in reports)
    assert all(parameter.is_cuda for parameter in run.model.parameters())
    assert not any(tensor.is_cuda for tensor in run.retired.values())
    checkpoint = Checkpoint.load(tmp_path / "ckpt.pt")
    stored = [*checkpoint.state.values(), *(checkpoint.side_head or {}).values()]
    assert not any(tensor.is_cuda for tensor in stored)
    images = digits().test.images
    on_cpu = logits(checkpoint.build_gated(), run.normalize.cpu(), images)
    on_gpu = logits(checkpoint.build_gated().cuda(), run.normalize.cuda(), images.cuda()).cpu()
    assert torch.allclose(on_cpu, on_gpu, atol=1e-2 * float(on_cpu.abs().max()))


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    for _ in range(5):
        first.save(first.run_epoch())
    again = trainer(tmp_path)
    again.resume()
    assert again.epoch == 5
    assert again.registry.dead == first.registry.dead
    again.run(lambda report: None)


def test_the_gate_waits_for_nothing() -> None:
    """A step with gates makes no host synchronisation: torch raises at the first one."""
    gate = EpsilonGate(2.5).cuda().train()
    shortcut = torch.randn(8, 4, 6, 6, device="cuda", requires_grad=True)
    branch = torch.randn(8, 4, 6, 6, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gate(shortcut, branch).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_the_gate_is_the_papers(dtype: torch.dtype, scale: float) -> None:
    gate = EpsilonGate(2.5).cuda().train()
    branch = scale * torch.randn(8, 4, 6, 6, device="cuda").clamp(-2, 2).to(dtype)
    shortcut = torch.randn(8, 4, 6, 6, device="cuda").to(dtype)
    expected = shortcut + relu_gate(branch, 2.5)
    assert torch.equal(gate(shortcut, branch), expected)
