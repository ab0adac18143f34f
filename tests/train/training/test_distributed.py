from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eps_core.errors import ConfigError, PeerError, TrainingError
from eps_train.config import TrainingConfig
from eps_train.gating import rewriting
from eps_train.gating.gate import EpsilonGate
from eps_train.gating.pruning_state import watch_gates
from eps_train.models.spec import NetworkSpec
from eps_train.training import distributed
from eps_train.training.checkpoint import Checkpoint, GateRecord
from eps_train.training.distributed import ALONE, Group, StopRequest
from eps_train.training.evaluate import EpochMetrics
from eps_train.training.trainer import Stopped, Trainer
from tests.train import processes
from tests.train.runs import (
    PRUNED,
    PRUNING,
    PruningTrainer,
    digits,
    pruned_blocks,
    pruning_trainer,
    trainer,
)

RUN = replace(PRUNING, epochs=6, head_epochs=1, epsilon_warmup=2, self_distillation=True, ema=0.9)
SMOOTH = replace(
    PRUNING,
    model="tests.train.smooth:Smooth",
    aux_loss_weight=0.0,
    epochs=2,
    batch_size=40,
    shift=0,
)


@dataclass
class Outcome:
    """What one process has at the end of a run."""

    reports: list[EpochMetrics]
    state: dict[str, Tensor]
    momentum: list[Tensor]
    dead: tuple[str, ...]
    stopped_at: tuple[int, int] | None = None
    signal: int | None = None


def outcome(run: Trainer, reports: list[EpochMetrics]) -> Outcome:
    state = dict(run.network.state_dict())
    momentum = [run.optimizer.state[p]["momentum_buffer"] for p in run.network.parameters()]
    return Outcome(reports, state, momentum, run.pruner.tracker.dead)


def whole_run(
    group: Group, folder: Path, config: TrainingConfig, kind: type[Trainer] = PruningTrainer
) -> Outcome:
    run = trainer(folder, config, kind=kind, group=group)
    reports: list[EpochMetrics] = []
    run.run(reports.append)
    return outcome(run, reports)


def stopped_run(group: Group, folder: Path, config: TrainingConfig, question: int) -> Outcome:
    """Process 1 alone is asked to stop, when it looks for the `question`-th time."""
    request = StopRequest(group)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if group.rank == 1 and asked == question:
            request.signal = signal.SIGTERM
        return request()

    run = pruning_trainer(folder, config, group=group, stop=stop)
    reports: list[EpochMetrics] = []
    with pytest.raises(Stopped):
        run.run(reports.append)
    done = outcome(run, reports)
    done.stopped_at, done.signal = (run.epoch, run.step), request.signal
    return done


def resumed_run(group: Group, folder: Path, config: TrainingConfig) -> Outcome:
    run = pruning_trainer(folder, config, group=group)
    run.resume()
    reports: list[EpochMetrics] = []
    run.run(reports.append)
    return outcome(run, reports)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, processes.run(whole_run, folder, RUN)


def assert_same_state(ours: Outcome, theirs: Outcome, *, counters: bool = True) -> None:
    assert ours.state.keys() == theirs.state.keys()
    for name, tensor in ours.state.items():
        assert torch.equal(tensor, theirs.state[name]), name
    assert all(torch.equal(a, b) for a, b in zip(ours.momentum, theirs.momentum, strict=True))


def test_both_processes_have_the_same_weights_across_a_removal(
    undisturbed: tuple[Path, list[Outcome]],
) -> None:
    _, (first, second) = undisturbed
    assert pruned_blocks(first.reports) == pruned_blocks(second.reports) == PRUNED
    assert not any(
        name.startswith(tuple(f"model.{b}." for b in first.dead)) for name in first.state
    )
    assert_same_state(first, second)
    assert [r.loss for r in first.reports] == [r.loss for r in second.reports]


def test_a_step_counts_once_for_each_process_that_judges(
    undisturbed: tuple[Path, list[Outcome]],
) -> None:
    folder, (first, _) = undisturbed
    steps = digits().identity.sizes["train"] // RUN.batch_size
    live = [gate for gate in first.reports[-1].gates if gate.death is None]
    assert live
    assert {gate.steps for gate in live} == {2 * steps}
    death = next(gate.death for gate in Checkpoint.load(folder / "ckpt.pt").gates if gate.death)
    assert death.steps == 2 * steps * RUN.patience


def test_the_result_is_an_ordinary_checkpoint(undisturbed: tuple[Path, list[Outcome]]) -> None:
    folder, _ = undisturbed
    checkpoint = Checkpoint.load(folder / "ckpt.pt")
    assert checkpoint.metrics["test"]["samples"] == len(digits().test)
    checkpoint.build_gated()


@pytest.mark.parametrize("question", [10, 60])
def test_a_stop_that_reaches_one_process_ends_both_at_the_same_step_and_resumes_exactly(
    undisturbed: tuple[Path, list[Outcome]], tmp_path: Path, question: int
) -> None:
    """Before the first removal, and after it; in the middle of an epoch."""
    stopped = processes.run(stopped_run, tmp_path, RUN, question)
    assert stopped[0].stopped_at == stopped[1].stopped_at
    assert stopped[0].stopped_at is not None
    assert stopped[0].stopped_at[1] > 0
    assert [each.signal for each in stopped] == [signal.SIGTERM] * 2
    resumed = processes.run(resumed_run, tmp_path, RUN)
    _, whole = undisturbed
    for rank in range(2):
        assert_same_state(resumed[rank], whole[rank])
        reports = stopped[rank].reports + resumed[rank].reports
        assert [r.loss for r in reports] == [r.loss for r in whole[rank].reports]
        assert [r.gates for r in reports] == [r.gates for r in whole[rank].reports]


def test_one_process_does_not_go_on_with_the_run_of_two(
    undisturbed: tuple[Path, list[Outcome]],
) -> None:
    folder, _ = undisturbed
    message = r"last\.pt: belongs to a run of 2 processes, not 1; .*--nproc-per-node 2"
    with pytest.raises(ConfigError, match=message):
        pruning_trainer(folder, RUN).resume()


# -- the scope of the gates


def records(outcome: Outcome) -> list[tuple[GateRecord, ...]]:
    return [report.gates for report in outcome.reports]


# Between the responses of the two blocks. Those of a whole batch differ from it by 2% or more, so
# that no rounding decides.
BETWEEN = 1.5


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    run = trainer(tmp_path_factory.mktemp("alone"), SMOOTH, epsilon=BETWEEN)
    reports: list[EpochMetrics] = []
    run.run(reports.append)
    return outcome(run, reports)


def test_global_gates_judge_as_one_process_judges_the_whole_batch(
    alone: Outcome, tmp_path: Path
) -> None:
    config = replace(SMOOTH, epsilon=BETWEEN, gate_scope="global")
    both = processes.run(whole_run, tmp_path, config, Trainer)
    assert_same_state(*both)
    flickers = False
    for ours, theirs in zip(records(both[0]), records(alone), strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine.steps, mine.closed_steps) == (other.steps, other.closed_steps)
            assert mine.peak == pytest.approx(other.peak, rel=1e-4)
            flickers |= 0 < mine.closed_steps < mine.steps
    assert flickers, "no gate both opened and closed: the comparison says nothing"
    for name, tensor in both[0].state.items():
        assert torch.allclose(tensor, alone.state[name], rtol=1e-3, atol=1e-5), name


def test_gates_of_a_replica_judge_its_own_part(tmp_path: Path) -> None:
    """As in the paper: half a batch answers less strongly than the whole, so more gates close."""
    # The weights stay as they are, so that both runs judge the same responses.
    still = replace(SMOOTH, epochs=1, lr_schedule=((0, 1e-12),), final_decay=(), weight_decay=0.0)
    run = trainer(tmp_path, still)
    with watch_gates(run.pruner.gates, EpsilonGate.measure) as seen:
        run.run_epoch()
    middle = torch.stack(seen["gate"]).sort().values[len(seen["gate"]) // 2 - 1 :][:2]
    config = replace(still, epsilon=float(middle.mean()))
    alone = whole_run(ALONE, tmp_path, config, Trainer)
    both = processes.run(whole_run, tmp_path, config, Trainer)
    assert_same_state(*both)
    ours, theirs = records(both[0])[0], records(alone)[0]
    assert [gate.steps for gate in ours] == [2 * gate.steps for gate in theirs]
    # Where the whole batch is within epsilon both halves are; elsewhere, one of them often is.
    assert sum(g.closed_steps for g in ours) > 2 * sum(g.closed_steps for g in theirs)


def gradients(group: Group, open_on: int) -> list[Tensor]:
    """Gradients after three steps in which the gates are open on one process alone."""
    config = replace(SMOOTH, compile=False)
    spec = NetworkSpec.parse(config.model, in_channels=1, classes=10)
    torch.manual_seed(0)
    run = trainer(Path("nowhere"), config, group=group)
    assert run.spec == spec
    for gate in run.pruner.gates.values():
        gate.set_epsilon(0.0 if group.rank == open_on else 1e9)
    run.network.train()
    batches = run.batches.epoch(0, first=0)
    for _ in range(3):
        run.take_step(next(batches))
    weight = run.model.get_parameter("two.weight").grad
    assert weight is not None
    assert int(run.pruner.gates["gate"].closed_steps) == (0 if group.rank == open_on else 3)
    return [p.grad for p in run.network.parameters() if p.grad is not None]


def test_a_branch_that_is_shut_on_one_process_learns_from_the_other() -> None:
    both = processes.run(gradients, 1)
    assert len(both[0]) == len(both[1])
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    assert all(bool(gradient.any()) for gradient in both[0])


# -- errors


def failing_leader(group: Group) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    try:
        group.lead(fail)
    except OSError as error:
        raise TrainingError(f"as it was: {error}") from None


def test_an_error_of_the_leader_ends_the_others_too() -> None:
    leader, follower = processes.run(failing_leader)
    assert isinstance(leader, TrainingError)
    assert "No space left" in str(leader)
    assert isinstance(follower, PeerError)


def odd_batch(group: Group) -> None:
    trainer(Path("nowhere"), RUN, batch_size=33, group=group)


def test_a_batch_that_cannot_be_shared_is_refused_once() -> None:
    leader, follower = processes.run(odd_batch)
    assert isinstance(leader, ConfigError)
    assert str(leader).startswith("--batch-size: 2 processes cannot share 33 images")
    assert isinstance(follower, PeerError)


def poisoned(group: Group, folder: Path) -> None:
    """The response of one block is not a number, in step 3 of process 1 alone."""
    run = trainer(folder, PRUNING, group=group)
    calls = 0

    def poison(module: Any, arguments: Any, output: Tensor) -> Tensor | None:
        nonlocal calls
        calls += 1
        return output * float("nan") if group.rank == 1 and calls == 3 else None

    run.model.get_submodule("stages.1.1.conv2").register_forward_hook(poison)
    run.run_epoch()


def test_a_process_whose_loss_is_not_finite_ends_all_and_its_block_is_named(tmp_path: Path) -> None:
    leader, follower = processes.run(poisoned, tmp_path)
    assert isinstance(leader, TrainingError)
    assert "epoch 1, step 3: block stages.1.1 is no longer finite" in str(leader)
    assert isinstance(follower, PeerError)


def lost(group: Group) -> None:
    if group.rank == 1:
        raise TrainingError("gone")
    group.add(torch.zeros(3))


def test_a_process_that_went_without_a_word_is_one_line() -> None:
    leader, follower = processes.run(lost)
    assert isinstance(follower, TrainingError)
    assert isinstance(leader, TrainingError)
    assert "process 0 lost contact with another process" in str(leader)
    assert "--resume" in str(leader)


# -- small things


def led_and_first(group: Group, folder: Path) -> tuple[str, bool, list[int], list[str]]:
    """Who enters, who comes first, and what each gets."""

    def download() -> str:
        file = folder / "file"
        if group.leads:
            file.write_text("downloaded")
        return file.read_text()

    read = group.first(download)
    entered = []

    class Lock:
        def __enter__(self) -> None:
            entered.append(group.rank)

        def __exit__(self, *_: object) -> None:
            entered.append(group.rank)

    with group.led(Lock()):
        held = bool(entered)
    return read, held, entered, group.gather(f"process {group.rank}")


def test_the_leader_locks_alone_and_comes_first(tmp_path: Path) -> None:
    first, second = processes.run(led_and_first, tmp_path)
    assert first == ("downloaded", True, [0, 0], ["process 0", "process 1"])
    assert second == ("downloaded", False, [], ["process 0", "process 1"])


def test_one_process_is_a_group_of_its_own() -> None:
    group = distributed.ALONE
    assert (group.rank, group.size, group.leads) == (0, 1, True)
    assert group.lead(lambda: 7) == group.first(lambda: 7) == 7
    assert group.gather("x") == ["x"]
    assert group.part(5) == slice(0, 5)
    assert group.post_largest(3)() == 3


def test_the_records_of_gates_are_not_among_the_shared_statistics() -> None:
    spec = NetworkSpec.parse("cifar:8x4", in_channels=1, classes=10)
    model = spec.build()
    shared = {id(tensor) for tensor in distributed.running_statistics(model)}
    for module in model.modules():
        own = [id(buffer) for buffer in module.buffers(recurse=False)]
        assert shared.isdisjoint(own) if isinstance(module, EpsilonGate) else shared.issuperset(own)
    assert rewriting.gates(model)
