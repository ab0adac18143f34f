"""The gate against the paper's own construction, and the habits that make it safe to train with."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eps_train.gating import rewriting
from eps_train.gating.gate import (
    EpsilonGate,
    GateRecords,
    _largest_by_norm,
    _largest_by_range,
    response,
)
from eps_train.models.resnets import CifarResNet
from tests.train.gpus import never_waiting
from tests.train.oracle import relu_gate
from tests.train.runs import trainer

EPSILON = 2.5
SHAPES = [(1, 4, 5, 3), (128, 4, 2, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(
    shape: tuple[int, ...], dtype: torch.dtype, peak: float, *, channels_last: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Shortcut, branch whose largest magnitude is exactly `peak`, and a gradient to send back."""
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    shortcut, branch, gradient = (torch.randn(shape, generator=generator) for _ in range(3))
    branch = branch.clamp(-2, 2) * (0.9 * peak / 2)
    branch.view(-1)[-1] = -peak  # the last element, and negative: easy to overlook
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return (
        shortcut.to(dtype, memory_format=memory).requires_grad_(),
        branch.to(dtype, memory_format=memory).requires_grad_(),
        gradient.to(dtype, memory_format=memory),
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("peak", "closed"),
    [(0.3, True), (2.484375, True), (EPSILON, True), (2.515625, False), (9.0, False)],
)
def test_gate_is_the_four_relu_form(
    shape: tuple[int, ...], dtype: torch.dtype, peak: float, closed: bool, channels_last: bool
) -> None:
    shortcut, branch, gradient = operands(shape, dtype, peak, channels_last=channels_last)
    gate = EpsilonGate(EPSILON).train()
    out = gate(shortcut, branch)
    out.backward(gradient)
    got = (out.detach(), shortcut.grad, branch.grad)

    shortcut, branch, gradient = operands(shape, dtype, peak, channels_last=channels_last)
    expected = shortcut + relu_gate(branch, EPSILON)
    expected.backward(gradient)

    assert torch.equal(got[0], expected)
    for ours, theirs in zip(got[1:], (shortcut.grad, branch.grad), strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
    assert int(gate.closed_steps) == closed
    assert got[0].dtype == dtype


@pytest.mark.parametrize("shared", [False, True], ids=["own record", "shared records"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_relative_response_is_divided_by_the_rms_of_the_input(scale: float, shared: bool) -> None:
    shortcut = scale * torch.tensor([[3.0, -4.0]])  # its RMS is 3.5355
    gate = EpsilonGate(0.5).train()
    gate.relative = True
    records = GateRecords([gate]) if shared else None
    for share, closed in ((0.49, True), (0.51, False)):
        branch = scale * torch.tensor([[1.0, -share * 12.5**0.5]])
        out = gate(shortcut, branch)
        if records is not None:
            records.update()
        assert torch.equal(out, shortcut if closed else shortcut + branch)
    assert gate.peak.item() == pytest.approx(0.51, rel=1e-5)
    assert (int(gate.closed_steps), int(gate.finite_steps), int(gate.steps)) == (1, 2, 2)
    assert copy.deepcopy(gate).relative
    assert "relative" in repr(gate)


def test_a_relative_response_to_an_input_of_zeros_is_finite() -> None:
    gate = EpsilonGate(0.5).train()
    gate.relative = True
    assert torch.equal(gate(torch.zeros(1, 2), torch.ones(1, 2)), torch.ones(1, 2))
    assert int(gate.finite_steps) == 1
    gate(torch.ones(1, 2), torch.tensor([[math.nan, 0.0]]))
    assert int(gate.finite_steps) == 1


@pytest.mark.parametrize("steps", [3, 25, -1, -25])
def test_threshold_is_sharp_to_the_last_bit(steps: int) -> None:
    """Representable numbers right beside epsilon; the four ReLUs ramp within 1e-6 above it."""
    peak = torch.tensor(EPSILON)
    for _ in range(abs(steps)):
        peak = torch.nextafter(peak, torch.tensor(math.copysign(math.inf, steps)))
    branch = torch.tensor([[0.5, -float(peak)]])
    shortcut = torch.ones(1, 2)
    out = EpsilonGate(EPSILON).train()(shortcut, branch)
    assert torch.equal(out, shortcut + branch if steps > 0 else shortcut)
    if steps < 0 or steps > 10:  # 25 steps above are 6e-6: beyond the ramp
        assert torch.equal(out, shortcut + relu_gate(branch, EPSILON))


def test_one_loud_sample_opens_the_gate_for_the_whole_batch() -> None:
    branch = torch.full((8, 2, 3, 3), 0.1)
    branch[5, 1, 2, 0] = -3.0
    out = EpsilonGate(EPSILON).train()(torch.zeros(8, 2, 3, 3), branch)
    assert torch.equal(out, branch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nonfinite_response_is_never_hidden(poison: float, dtype: torch.dtype) -> None:
    gate = EpsilonGate(EPSILON).train()
    shortcut, branch = torch.zeros(2, 3, dtype=dtype), torch.full((2, 3), 0.1, dtype=dtype)
    gate(shortcut, branch)
    branch[1, 1] = poison
    out = gate(shortcut, branch)
    gate(shortcut, branch)
    assert not out[1, 1].isfinite()
    assert torch.equal(out.isfinite(), branch.isfinite())
    assert (int(gate.steps), int(gate.closed_steps), int(gate.finite_steps)) == (3, 1, 1)
    assert float(gate.peak) == math.inf


def test_evaluation_opens_live_gates_and_shuts_dead_ones() -> None:
    shortcut, branch = torch.randn(4, 3), torch.randn(4, 3) * 0.01
    gate = EpsilonGate(EPSILON).eval()
    assert torch.equal(gate(shortcut, branch), shortcut + branch)
    gate.latch()
    assert torch.equal(gate(shortcut, branch), shortcut)
    assert int(gate.steps) == 0, "evaluation is no part of the training record"


def test_a_latched_gate_stays_shut_in_training_and_passes_no_gradient() -> None:
    shortcut = torch.randn(4, 3, requires_grad=True)
    branch = (torch.randn(4, 3) * 100).requires_grad_()
    gate = EpsilonGate(EPSILON).train()
    gate.latch()
    out = gate(shortcut, branch)
    out.sum().backward()
    assert torch.equal(out, shortcut)
    assert branch.grad is not None
    assert shortcut.grad is not None
    assert not branch.grad.any()
    assert torch.equal(shortcut.grad, torch.ones(4, 3))


@pytest.mark.parametrize("epsilon", [100.0, 0.0])
def test_a_shut_gate_leaves_the_branch_to_weight_decay(epsilon: float) -> None:
    """The optimizer passes over a weight that has no gradient: a shut gate must give it zeros."""
    layer, gate = nn.Linear(3, 3), EpsilonGate(epsilon).train()
    if not epsilon:
        gate.latch()
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, weight_decay=0.5)
    x = torch.randn(4, 3)
    gate(x, layer(x)).sum().backward()
    optimizer.step()
    assert torch.allclose(layer.weight, 0.75 * before)


def test_an_open_gate_keeps_no_tensor_for_the_backward_pass() -> None:
    """So it costs what an addition does, in time and in memory (on the CPU)."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    shortcut = torch.randn(4, 3, requires_grad=True)
    branch = torch.randn(4, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = EpsilonGate(1e-6).train()(shortcut, branch)
    assert kept == []
    assert out.grad_fn is not None
    assert out.grad_fn.name() == "AddBackward0"


def test_epsilon_zero_keeps_even_an_all_zero_branch_open() -> None:
    branch = torch.zeros(2, 3, requires_grad=True)
    gate = EpsilonGate(0.0).train()
    gate(torch.randn(2, 3), branch).sum().backward()
    assert branch.grad is not None
    assert torch.equal(branch.grad, torch.ones(2, 3))
    assert int(gate.closed_steps) == 0


def test_decision_is_made_in_float32() -> None:
    """In bfloat16, 2.51 would round up to 2.515625, and a response of that would close the gate."""
    branch = torch.tensor([[2.515625, 0.0]], dtype=torch.bfloat16)
    shortcut = torch.zeros_like(branch)
    with torch.autocast("cpu", torch.bfloat16):
        out = EpsilonGate(2.51).train()(shortcut, branch)
    assert torch.equal(out, branch)


def test_gate_trains_under_autocast() -> None:
    layer, gate = torch.nn.Linear(6, 6), EpsilonGate(1e-3).train()
    images = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = gate(images, layer(images))  # float32 shortcut, bfloat16 branch
        out.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0


def test_counters_hold_the_record_of_an_epoch() -> None:
    gate = EpsilonGate(EPSILON).train()
    for peak in (1.0, 7.5, 2.0, 0.5):
        gate(torch.zeros(1, 2), torch.tensor([[peak, -0.1]]))
    assert (int(gate.steps), int(gate.closed_steps), int(gate.finite_steps)) == (4, 3, 4)
    assert float(gate.peak) == 7.5
    gate.reset_record()
    assert (int(gate.steps), int(gate.closed_steps), float(gate.peak)) == (0, 0, 0.0)
    assert float(gate.epsilon) == EPSILON


def test_nothing_waits_for_the_device() -> None:
    """On the meta device there are no values: reading one on the host would raise."""
    gate = EpsilonGate(EPSILON).to("meta")
    operand = torch.empty(2, 3, 4, 4, device="meta", requires_grad=True)
    for mode in (True, False):
        gate.train(mode)(operand, operand).sum().backward()
    gate.latch()
    gate.reset_record()


def test_record_survives_saving() -> None:
    gate = EpsilonGate(EPSILON).train()
    gate(torch.zeros(1, 1), torch.ones(1, 1))
    gate.latch()
    other = EpsilonGate()
    other.load_state_dict(gate.state_dict())
    assert float(other.epsilon) == EPSILON
    assert bool(other.dead)
    assert int(other.closed_steps) == 1


def test_what_is_saved_keeps_its_names() -> None:
    """Checkpoints hold these names and types, and those of earlier versions must load."""
    state = EpsilonGate(EPSILON).state_dict()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == {
        "epsilon": (torch.float32, ()),
        "dead": (torch.bool, ()),
        "steps": (torch.int64, ()),
        "closed_steps": (torch.int64, ()),
        "finite_steps": (torch.int64, ()),
        "peak": (torch.float32, ()),
    }


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_threshold_decides(assign: bool) -> None:
    """Also in a gate that had no numbers before, as a network that is built to be filled."""
    with torch.device("meta" if assign else "cpu"):
        gate = EpsilonGate().train()
    gate.load_state_dict(EpsilonGate(EPSILON).state_dict(), assign=assign)
    shortcut, branch = torch.randn(4, 3), torch.ones(4, 3)
    assert torch.equal(gate(shortcut, branch), shortcut)
    assert torch.equal(gate(shortcut, 3 * branch), shortcut + 3 * branch)
    assert (int(gate.steps), int(gate.closed_steps), int(gate.finite_steps)) == (2, 1, 2)


def test_loading_asks_for_the_whole_record() -> None:
    state = EpsilonGate().state_dict()
    del state["closed_steps"]
    with pytest.raises(RuntimeError, match="closed_steps"):
        EpsilonGate().load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_threshold_and_record_stay_float32_in_a_network_of_half_precision(
    dtype: torch.dtype,
) -> None:
    gate = EpsilonGate(2.51).to(dtype).train()
    branch = torch.tensor([[2.515625, math.inf]], dtype=dtype)
    gate(torch.zeros_like(branch), torch.full_like(branch, 2.515625))
    gate(torch.zeros_like(branch), branch)
    assert (int(gate.steps), int(gate.closed_steps), int(gate.finite_steps)) == (2, 0, 1)
    assert gate.epsilon.dtype == gate.peak.dtype == torch.float32
    assert float(gate.epsilon) == torch.tensor(2.51).item()


@pytest.mark.parametrize("epsilon", [-1.0, math.nan, math.inf])
def test_impossible_epsilon(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon must be finite and at least 0"):
        EpsilonGate(epsilon)


# The formula for GPUs too: it computes on a CPU what it does there, only more slowly.
formulas = pytest.mark.parametrize("formula", [response, _largest_by_norm, _largest_by_range])


@formulas
@pytest.mark.parametrize("dtype", DTYPES)
def test_response_is_the_largest_magnitude_of_any_layout(
    formula: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    whole = torch.randn(3, 8, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    layouts = {
        "contiguous": whole,
        "channels last": whole.to(memory_format=torch.channels_last),
        "transposed": whole.transpose(1, 3),
        "strided": whole[:, ::2, 1:],
        "matrix": whole.flatten(1),
        "single": whole[:1, :1, :1, :1],
    }
    for name, tensor in layouts.items():
        found = formula(tensor)
        assert found.dtype == torch.float32, name
        assert found.shape == (), name
        assert float(found) == float(tensor.float().abs().max()), name


@formulas
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_element_that_is_not_finite_is_the_response(
    formula: Callable[[Tensor], Tensor], dtype: torch.dtype, value: float
) -> None:
    branch = torch.full((3, 8, 7, 5), 0.1, dtype=dtype)
    branch[1, 2, 3, 4] = value
    found = formula(branch)
    assert float(found) == math.inf or (math.isnan(value) and bool(found.isnan()))


@pytest.mark.parametrize("epsilon", [0.0, 1e6])
def test_compiles_without_a_graph_break(epsilon: float) -> None:
    """In both modes, and to the same numbers and record as without the compiler."""
    torch.manual_seed(0)
    plain = rewriting.trace(CifarResNet(depth=8, width=4))
    for gate in rewriting.gates(plain).values():
        gate.set_epsilon(epsilon)
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = torch.randn(4, 3, 16, 16)
    for training in (True, False):
        model.train(training)
        plain.train(training)
        ours, theirs = compiled(images), plain(images)
        ours.sum().backward()
        theirs.sum().backward()
        assert torch.allclose(ours, theirs, atol=1e-5)
    expected = plain.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
    gradients = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        theirs_grad = gradients[name].grad
        assert parameter.grad is not None
        assert theirs_grad is not None
        assert torch.allclose(parameter.grad, theirs_grad, atol=1e-4), name
    torch.compiler.reset()


# -- what it costs, and the records of many gates --------------------------------------------------


class Operations(TorchDispatchMode):
    """The operations that are dispatched, but for views: on a GPU each is a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_gate_is_four_operations_a_pass_and_the_records_four_for_all() -> None:
    """On the meta device, whose path is the one of GPUs."""
    gates = [EpsilonGate(EPSILON).to("meta").train() for _ in range(9)]
    records = GateRecords(gates)
    shortcut = torch.empty(2, 3, device="meta", requires_grad=True)
    branch = torch.empty(2, 3, device="meta", requires_grad=True)
    with Operations() as forward:
        outs = [gate(shortcut, branch) for gate in gates]
        records.update()
    counted = {name: forward.names.count(name) for name in set(forward.names)}
    assert counted.pop("linalg_vector_norm.out") == 9
    assert counted.pop("gt.Tensor") == 9
    assert counted.pop("addcmul.default") == 9
    assert sum(counted.values()) == 4
    for out in outs:
        with Operations() as backward:
            torch.autograd.grad(out, branch, torch.empty_like(out))
        assert backward.names.count("mul.Tensor") == 1
        assert len(backward.names) <= 2, backward.names  # `empty_like` above is one of them


def judge(gates: list[EpsilonGate], peaks: tuple[float, ...]) -> None:
    for gate, peak in zip(gates, peaks, strict=True):
        gate(torch.zeros(1, 2), torch.tensor([[-peak, 0.25]]))


STEPS = ((1.0, 3.0, 2.5), (4.0, math.inf, 0.5), (math.nan, 1.0, 2.0))


def test_records_kept_together_are_those_of_each_gate() -> None:
    alone = [EpsilonGate(EPSILON).train() for _ in range(3)]
    joined = copy.deepcopy(alone)
    for gates in (alone, joined):
        judge(gates, (2.0, 2.0, 5.0))  # a record that is there is gone on with
    records = GateRecords(joined)
    for gates in (alone, joined):
        gates[2].latch()
        gates[0].set_epsilon(0.5)
    for step in STEPS:
        judge(alone, step)
        judge(joined, step)
        records.update()
    for one, other in zip(alone, joined, strict=True):
        assert one.state_dict() == other.state_dict()
    for gates in (alone, joined):
        gates[1].reset_record()
        gates[2].unlatch()
    judge(alone, STEPS[0])
    judge(joined, STEPS[0])
    records.update()
    for one, other in zip(alone, joined, strict=True):
        assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize("way", ["copy", "pickle", "load", "assign", "move"])
def test_a_gate_that_leaves_counts_every_step_once(way: str) -> None:
    """Also where the vectors go on to be updated: its record is its own again."""
    gates = [EpsilonGate(EPSILON).train() for _ in range(2)]
    records = GateRecords(gates)
    judge(gates, (1.0, 3.0))
    records.update()
    if way == "copy":
        gates, records = copy.deepcopy((gates, records))
    elif way == "pickle":
        gates, records = pickle.loads(pickle.dumps((gates, records)))
    elif way == "move":
        gates = [gate.double() for gate in gates]
    else:
        for gate in gates:
            state = {name: tensor.clone() for name, tensor in gate.state_dict().items()}
            gate.load_state_dict(state, assign=way == "assign")
    judge(gates, (4.0, 2.0))
    records.update()
    assert [int(gate.steps) for gate in gates] == [2, 2]
    assert [int(gate.closed_steps) for gate in gates] == [1, 1]
    assert [float(gate.peak) for gate in gates] == [4.0, 3.0]


class FormerGate(EpsilonGate):
    """The gate as it was before: seven operations forward, two backward, its record in each call.

    It has no part in the decisions and numbers of the one that took its place but as a reference.
    """

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        peak = response(branch.detach()).nan_to_num(nan=math.inf, posinf=math.inf)
        within = peak <= self._limits
        self._counts.add_(within)
        torch.maximum(self.peak, peak, out=self.peak)
        shut = within[0] | self.dead
        return torch.addcmul(shortcut, branch, shut.logical_not()) if shut else shortcut + branch


def test_training_is_that_of_the_former_gate_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gates that are open, shut, dead, and that epsilon decides about."""
    states = []
    for former in (False, True):
        run = trainer(tmp_path)
        if former:
            monkeypatch.setattr(run.network, "join_records", lambda: None)
            for gate in run.pruner.gates.values():
                gate.__class__ = FormerGate
        for gate, epsilon in zip(run.pruner.gates.values(), (0.0, 1e9, 3.0) * 3, strict=True):
            gate.set_epsilon(epsilon)
        list(run.pruner.gates.values())[4].latch()
        run.network.train()
        batches = run.batches.epoch(0, first=0)
        for _ in range(12):
            run.take_step(next(batches))
        states.append(run.network.state_dict())
    assert any(name.endswith("closed_steps") for name in states[0]), "the records are among them"
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


# Two processes; the second one's branch decides. It prints: shut or open, closed, finite, peak.
PROCESS = """
import sys
import torch
import torch.distributed as dist
from eps_train.gating.gate import EpsilonGate

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
gate = EpsilonGate(2.5).train()
gate.process_group = dist.group.WORLD
for theirs in (1.5, 4.0, float("nan"), 2.0):
    branch = torch.tensor([[0.5, -theirs if rank else 0.25]])
    out = gate(torch.zeros(1, 2), branch)
    print("shut" if torch.equal(out, torch.zeros(1, 2)) else "open", end=" ")
print(int(gate.steps), int(gate.closed_steps), int(gate.finite_steps), float(gate.peak))
dist.destroy_process_group()
"""


def test_gates_of_one_group_decide_alike(tmp_path: Path) -> None:
    """What one process sees opens the gates of all; NaN is not lost on the way to the others."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.split() == ["shut", "open", "open", "shut", "4", "2", "3", "inf"]


class Handle:
    """Stands for a process group: it must be neither copied nor pickled."""

    def __reduce__(self) -> str:
        raise TypeError("a process group belongs to its process")


def test_a_group_stays_in_its_process() -> None:
    gate = EpsilonGate(EPSILON).train()
    group: Any = Handle()
    gate.process_group = group
    assert copy.deepcopy(gate).process_group is None
    assert pickle.loads(pickle.dumps(gate)).process_group is None
    assert not any("group" in name for name in gate.state_dict())
    assert gate.process_group is group


def test_a_gate_does_not_go_on_alone_when_its_group_is_gone() -> None:
    gate = EpsilonGate(EPSILON).train()
    gate.process_group = Handle()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="process group of this gate has been destroyed"):
        gate(torch.zeros(1, 2), torch.ones(1, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
def test_a_gpu_is_never_waited_for(epsilon: float, training: bool) -> None:
    """torch raises at the first operation that makes the host wait."""
    gate = EpsilonGate(epsilon).cuda().train(training)
    shortcut = torch.randn(8, 4, 6, 6, device="cuda", requires_grad=True)
    branch = torch.randn(8, 4, 6, 6, device="cuda", requires_grad=True)
    with never_waiting():
        for memory in (torch.contiguous_format, torch.channels_last):
            gate(shortcut, branch.contiguous(memory_format=memory)).sum().backward()
        gate.latch()
        gate(shortcut, branch).sum().backward()
        gate.reset_record()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.3, 9.0, -9.0, math.inf, -math.inf, math.nan])
def test_a_gpu_finds_the_same_response(value: float, dtype: torch.dtype) -> None:
    branch = torch.full((3, 8, 7, 5), 0.1, dtype=dtype)
    branch[1, 2, 3, 4] = value
    for memory in (torch.contiguous_format, torch.channels_last):
        operand = branch.contiguous(memory_format=memory)
        ours, expected = response(operand.cuda()), response(operand)
        assert ours.dtype == torch.float32
        assert torch.equal(ours.cpu().nan_to_num(-1.0), expected.nan_to_num(-1.0))
