from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from eps_core.errors import ConfigError
from eps_train.config import TrainingConfig
from eps_train.gating import rewriting
from eps_train.gating.gate import EpsilonGate
from eps_train.models.resnets import BasicBlock
from eps_train.models.spec import NetworkSpec
from eps_train.training import forward
from eps_train.training.distributed import ALONE, Group
from eps_train.training.forward import TrainedNetwork
from eps_train.training.step import build
from tests.train.runs import PRUNING, pruning_trainer, remove, trainer

CPU = torch.device("cpu")


def network(config: TrainingConfig = PRUNING) -> TrainedNetwork:
    torch.manual_seed(0)
    spec = NetworkSpec.parse("cifar:14x4", in_channels=1, classes=10)
    made = build(spec, config, ALONE, CPU, classes=10)
    gates = [m for m in made.modules() if isinstance(m, EpsilonGate)]
    for gate, epsilon in zip(gates, (0.0, 1e9, 2.0, 0.0, 1e9, 2.0), strict=True):
        gate.set_epsilon(epsilon)
    return made


def some_images() -> Tensor:
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return images.contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def _no_compiled_leftovers() -> Any:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("training", [True, False])
def test_a_gated_network_compiles_to_one_graph(training: bool) -> None:
    explained = torch._dynamo.explain(network().train(training))(some_images())
    assert explained.graph_count == 1
    assert explained.graph_break_count == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_compiled_network_answers_and_counts_as_the_other(
    training: bool, dtype: torch.dtype | None
) -> None:
    answers, states = [], []
    for compiled in (False, True):
        made = network().train(training)
        made.join_records()
        call = torch.compile(made, backend="aot_eager", fullgraph=True) if compiled else made
        autocast = torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)
        for _ in range(2):
            with autocast:
                logits, side = call(some_images())
        assert (side is not None) == training
        if training:
            assert side is not None
            (logits.float().sum() + side.float().sum()).backward()
        answers.append(logits)
        gradients = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
        states.append((dict(made.state_dict()), gradients))
    loose = 1e-4 if dtype is None else 0.1
    first, second = (answer.float() for answer in answers)
    assert torch.allclose(first, second, rtol=loose, atol=loose)
    (eager, eager_gradients), (made_state, gradients) = states
    for name, tensor in eager.items():
        if ".gate." in name and not name.endswith("peak"):
            assert torch.equal(tensor, made_state[name]), name
    assert int(eager["model.stages.0.1.gate.closed_steps"]) == (2 if training else 0)
    assert eager_gradients.keys() == gradients.keys()
    if dtype is None:
        for name, gradient in eager_gradients.items():
            assert torch.allclose(gradient, gradients[name], rtol=loose, atol=loose), name


class Twice(nn.Module):
    """One block that is called twice, then one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = BasicBlock(2, 2), BasicBlock(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.own(self.shared(self.shared(x)))
        return out


def test_a_gate_that_is_called_twice_counts_both_calls() -> None:
    made = TrainedNetwork(rewriting.trace(Twice()), None).train()
    made.join_records()
    for _ in range(3):
        made(torch.randn(2, 2, 8, 8))
    shared, own = made.model.get_submodule("shared.gate"), made.model.get_submodule("own.gate")
    assert isinstance(shared, EpsilonGate)
    assert isinstance(own, EpsilonGate)
    assert (int(shared.steps), int(own.steps)) == (6, 3)


def test_a_removal_leaves_compiled_what_it_does_not_touch_and_forgets_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of nine blocks and the head one leaves, then one that the tap stands before."""
    compile_ = torch.compile
    count = 0

    def counting(model: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return model.forward

    def with_our_backend(module: Any, **options: Any) -> Any:
        return compile_(module, backend=counting, fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", with_our_backend)
    plain = trainer(tmp_path, patience=9)
    made = trainer(tmp_path, patience=9, compile=True)
    compiled = []
    for gone in (None, "stages.0.1", "stages.1.2"):
        if gone is not None:
            weight = weakref.ref(made.model.get_parameter(f"{gone}.conv1.weight"))
            for run in (plain, made):
                remove(run, gone)
            gc.collect()
            assert weight() is None, "its memory is still held"
        for run in (plain, made):
            run.run_epoch()
        compiled.append(count)
    assert compiled == [10, 10, 11]
    assert copy.deepcopy(made.network)(some_images())[0].shape == (8, 10)
    assert count == 11, "a copy passes images through its own model"
    assert made.pruner.gates.keys() == plain.pruner.gates.keys()
    for name, tensor in plain.network.state_dict().items():
        assert torch.allclose(tensor, made.network.state_dict()[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_a_run_through_the_real_compiler(tmp_path: Path) -> None:
    plain, made = (
        pruning_trainer(tmp_path, model="cifar:8x4"),
        pruning_trainer(tmp_path, model="cifar:8x4", compile=True),
    )
    expected, got = plain.run_epoch(), made.run_epoch()
    assert got.loss == pytest.approx(expected.loss, rel=1e-3)
    assert [g.steps for g in got.gates] == [g.steps for g in expected.gates]


def test_every_process_computes_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would run a module with `device_ids=[0]` on the first GPU, whichever holds it."""
    given = []

    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module, **options: Any) -> None:
            super().__init__()
            self.module = module
            given.append(options["device_ids"])

        @staticmethod
        def _set_params_and_buffers_to_ignore_for_model(module: Any, names: list[str]) -> None:
            assert any(name.endswith("gate.peak") for name in names)

        def forward(self, images: Tensor) -> Any:
            return self.module(images)

    class Pair(Group):
        """The second of two processes, without any other."""

        def __init__(self) -> None:
            super().__init__()
            self.world, self.rank, self.size = mock.Mock(), 1, 2

        def share(self, tensors: Any) -> None:
            pass

    monkeypatch.setattr(forward, "DistributedDataParallel", Wrapper)
    for device in (torch.device("cuda", 1), CPU):
        call = forward.Forward(network(), PRUNING, Pair(), device)
        assert call(some_images())[0].shape == (8, 10)
    assert given == [[1], None]


def test_no_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = r"--compile: needs a C\+\+ compiler, and no-such-compiler is not here"
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, compile=True)
    with pytest.raises(ConfigError, match="--compile: not supported on mps"):
        forward.require_compiler(torch.device("mps"))


def test_synchronised_batch_norm_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--sync-batchnorm: torch's SyncBatchNorm only takes"):
        trainer(tmp_path, sync_batchnorm=True)


def test_batch_norms_count_no_batches_and_their_state_is_that_of_others(tmp_path: Path) -> None:
    """Also where a batch norm has no momentum, and needs its count."""
    counted = trainer(tmp_path).spec.build()
    made = trainer(tmp_path).model
    assert made.state_dict().keys() == counted.state_dict().keys()
    assert not any("num_batches_tracked" in name for name, _ in made.named_buffers())
    counted.get_submodule("stem.1").num_batches_tracked.fill_(7)  # type: ignore[operator]
    made.load_state_dict(counted.state_dict())
    made.load_state_dict(dict(counted.state_dict()))
    counted.load_state_dict(made.state_dict())
    averaging = nn.BatchNorm2d(2, momentum=None)
    forward.drop_batch_counts(averaging)
    averaging(torch.randn(2, 2, 4, 4))
    assert averaging.state_dict()["num_batches_tracked"] == 1
