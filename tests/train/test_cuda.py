"""What only a GPU can show; skipped, and listed as skipped, where there is none."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from eps_train.gating.gate import EpsilonGate
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.distributed import Group
from eps_train.training.evaluate import EpochMetrics, logits, score
from eps_train.training.step import WARM_UP, GraphedStep, set_lr
from eps_train.training.trainer import Stopped, Trainer
from tests.train import processes
from tests.train.gpus import never_waiting
from tests.train.oracle import relu_gate
from tests.train.runs import PRUNED, digits, pruned_blocks, pruning_trainer, remove

pytestmark = [
    pytest.mark.gpu,
    # torch.compile imports parts of torch that torch itself has deprecated, and recommends TF32
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]

DEVICE = "cuda:0"


def trainer(folder: Path, **changes: Any) -> Trainer:
    """A run on the GPU in which the blocks of PRUNED die."""
    return pruning_trainer(folder, device=DEVICE, **{"cpu_threads": 0, **changes})


def test_blocks_die_and_the_checkpoint_answers_alike_on_the_cpu(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    reports: list[EpochMetrics] = []
    run.run(reports.append)
    assert pruned_blocks(reports) == PRUNED
    assert all(parameter.is_cuda for parameter in run.model.parameters())
    assert not any(tensor.is_cuda for tensor in run.pruner.removed_tensors.values())
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
    assert again.pruner.tracker.dead == first.pruner.tracker.dead != ()
    again.run(lambda report: None)
    assert set(again.pruner.tracker.dead) == set(PRUNED)


def test_the_gate_waits_for_nothing() -> None:
    """A step with gates makes no host synchronisation: torch raises at the first one."""
    gate = EpsilonGate(2.5).cuda().train()
    shortcut = torch.randn(8, 4, 6, 6, device="cuda", requires_grad=True)
    branch = torch.randn(8, 4, 6, 6, device="cuda", requires_grad=True)
    with never_waiting():
        gate(shortcut, branch).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_the_gate_is_the_papers(dtype: torch.dtype, scale: float) -> None:
    gate = EpsilonGate(2.5).cuda().train()
    branch = scale * torch.randn(8, 4, 6, 6, device="cuda").clamp(-2, 2).to(dtype)
    shortcut = torch.randn(8, 4, 6, 6, device="cuda").to(dtype)
    expected = shortcut + relu_gate(branch, 2.5)
    assert torch.equal(gate(shortcut, branch), expected)


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_blocks_die_in_every_precision_and_float32_ships(tmp_path: Path, precision: str) -> None:
    run = trainer(tmp_path, precision=precision)
    reports: list[EpochMetrics] = []
    run.run(reports.append)
    assert pruned_blocks(reports) == PRUNED
    assert not torch.backends.cudnn.allow_tf32, "allowed in training steps alone"
    assert torch.get_float32_matmul_precision() == "highest"
    checkpoint = Checkpoint.load(tmp_path / "ckpt.pt")
    assert {t.dtype for t in checkpoint.state.values() if t.is_floating_point()} == {torch.float32}
    device = torch.device(DEVICE)
    again = score(
        checkpoint.build_gated().to(device), run.normalize, digits().validation.to(device)
    )
    assert again.accuracy == checkpoint.metrics["validation"]["accuracy"]


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_convolutions_round_to_tf32_only_in_training_and_where_it_is_asked_for(
    tmp_path: Path, precision: str
) -> None:
    """A sum of products that float32 holds exactly and TF32 does not."""
    images = torch.full((1, 8, 4, 4), 1.0 + 2.0**-12, device=DEVICE)
    weight = torch.ones(8, 8, 3, 3, device=DEVICE)
    exact = float(torch.conv2d(images.cpu().double(), weight.cpu().double()).max())
    rounded = set()

    def convolve(module: torch.nn.Module, args: Any, output: Any) -> None:
        error = abs(float(torch.conv2d(images, weight).max()) - exact)
        assert error < 1e-4 or error > 1e-3
        rounded.add((module.training, error > 1e-3))

    run = trainer(tmp_path, precision=precision, epochs=1, cuda_graph="off")  # the hook waits
    run.model.register_forward_hook(convolve)
    run.run(lambda report: None)
    assert rounded == {(True, precision == "tf32"), (False, False)}


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_step_waits_for_nothing(tmp_path: Path, precision: str) -> None:
    run = trainer(tmp_path, precision=precision)
    run.network.train()
    batches = run.batches.epoch(0, first=0)
    run.take_step(next(batches))  # the first one makes its buffers and chooses its kernels
    batch = next(batches)
    with never_waiting():
        run.take_step(batch)


# -- the step as a CUDA graph ----------------------------------------------------------------------


def two_epochs(run: Trainer) -> dict[str, torch.Tensor]:
    """Two epochs with a removal between them; the weights after that."""
    run.run_epoch()
    block = next(iter(run.pruner.gates))
    remove(run, block)
    run.run_epoch()
    return {name: tensor.clone() for name, tensor in run.network.state_dict().items()}


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("model", ["cifar:20x4", "tests.train.smooth:Dropping"])
def test_a_replayed_step_is_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, precision: str
) -> None:
    """Its masks of dropout too; over a removal, after which it is captured again."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    found = {}
    for choice in ("off", "on"):
        run = trainer(tmp_path, model=model, precision=precision, patience=9, cuda_graph=choice)
        found[choice] = two_epochs(run)
        captures = run.take_step.captures if isinstance(run.take_step, GraphedStep) else 0
        assert captures == {"off": 0, "on": 2}[choice]
    for name, tensor in found["on"].items():
        assert torch.allclose(tensor, found["off"][name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_replayed_step_waits_for_nothing(tmp_path: Path, precision: str) -> None:
    run = trainer(tmp_path, precision=precision, cuda_graph="on")
    run.network.train()
    batches = run.batches.epoch(0, first=0)
    for _ in range(WARM_UP + 1):
        run.take_step(next(batches))
    run.totals.zero_()
    with never_waiting():
        for _ in range(3):
            run.totals += run.take_step(next(batches))
            set_lr(run.optimizer, 0.01)
    assert bool(run.totals.isfinite().all())
    assert {int(gate.steps) for gate in run.pruner.gates.values()} == {WARM_UP + 4}


def test_a_run_goes_on_where_a_step_cannot_be_captured(tmp_path: Path) -> None:
    """Also one with dropout: a failed capture leaves torch's generator unable to draw."""
    run = trainer(tmp_path, model="tests.train.smooth:Dropping", epochs=1)

    def wait(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        output.sum().item()

    run.model.register_forward_hook(wait)
    with pytest.warns(UserWarning, match="no CUDA graph: a step cannot be captured"):
        run.run(lambda report: None)
    assert (tmp_path / "ckpt.pt").exists()


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_resumed_run_ends_in_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, share: float
) -> None:
    """Before and after the removals; with the kernels of cuDNN that always answer alike."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    whole = trainer(tmp_path / "whole", precision=precision)
    whole.run(lambda report: None)
    stopped = trainer(tmp_path / "stopped", precision=precision)
    calls = iter(range(1, 10_000))
    at = round(share * stopped.config.epochs * stopped.batches.steps)
    monkeypatch.setattr(stopped, "_stop", lambda: next(calls) == at)
    with pytest.raises(Stopped):
        stopped.run(lambda report: None)
    again = trainer(tmp_path / "stopped", precision=precision)
    again.resume()
    again.run(lambda report: None)
    theirs = whole.network.state_dict()
    for name, tensor in again.network.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


# -- memory and compilation ------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_memory_falls_when_blocks_leave(tmp_path: Path, compiled: bool) -> None:
    run = trainer(tmp_path, model="cifar:20x32", compile=compiled)
    run.network.train()
    batches = run.batches.epoch(0, first=0)
    run.take_step(next(batches))
    run.optimizer.zero_grad()
    before, weights = torch.cuda.memory_allocated(), run.parameters()
    remove(run, "stages.2.1", "stages.2.2")
    gc.collect()
    freed = before - torch.cuda.memory_allocated()
    assert freed >= 2 * 4 * (weights - run.parameters()), "parameters and their momentum, float32"
    run.take_step(next(batches))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_compiled_network_is_one_graph_and_counts_alike(tmp_path: Path, precision: str) -> None:
    counted, losses = [], []
    for compiled in (False, True):
        run = trainer(tmp_path, precision=precision, epochs=1)
        for gate, epsilon in zip(run.pruner.gates.values(), (0.0, 1e9) * 5, strict=False):
            gate.set_epsilon(epsilon)
        run.network.train()
        if compiled:
            explained = torch._dynamo.explain(run.network)(torch.randn(32, 1, 8, 8, device="cuda"))
            assert explained.graph_break_count == 0
            for gate in run.pruner.gates.values():
                gate.reset_record()
            run = _rebuilt(run, tmp_path)
        batches = run.batches.epoch(0, first=0)
        losses.append([float(run.take_step(next(batches))[0]) for _ in range(3)])
        counted.append([(int(g.steps), int(g.closed_steps)) for g in run.pruner.gates.values()])
    assert counted[0] == counted[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def _rebuilt(run: Trainer, folder: Path) -> Trainer:
    """The same run from its start, compiled; its gates as they were set."""
    made = trainer(folder, precision=run.config.precision, epochs=1, compile=True)
    for block, gate in made.pruner.gates.items():
        gate.set_epsilon(float(run.pruner.gates[block].epsilon))
    made.network.train()
    return made


def test_a_compiled_run_goes_on_over_its_removals(tmp_path: Path) -> None:
    reports: list[EpochMetrics] = []
    trainer(tmp_path, compile=True).run(reports.append)
    assert pruned_blocks(reports) == PRUNED


# -- NCCL ------------------------------------------------------------------------------------------


def nccl_run(group: Group, folder: Path, changes: dict[str, Any]) -> dict[str, int]:
    assert group.world is not None
    reports: list[EpochMetrics] = []
    trainer(folder, group=group, **changes).run(reports.append)
    return pruned_blocks(reports)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate_scope": "global"},
        {"sync_batchnorm": True},
        {"precision": "fp16"},
        {"compile": True},
        {"compile": True, "gate_scope": "global"},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_one_process_under_nccl_trains_removes_and_saves(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    (died,) = processes.run(nccl_run, tmp_path, changes, size=1, device="cuda")
    assert died == PRUNED
    Checkpoint.load(tmp_path / "ckpt.pt").build_gated()
