"""`BlockPruner` in a user's own loop."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import eps_train
from eps_core.errors import ConfigError, DataError, GraphError
from eps_train.gating import rewriting
from eps_train.gating.pruner import BlockPruner
from eps_train.training.distributed import Group
from tests.train import processes
from tests.train.gating.timers import LAYERS, timed_by
from tests.train.loops import (
    EXAMPLE,
    HELDOUT,
    SHUT,
    STEPS,
    SubsetPruner,
    batches,
    own_net,
    sgd,
    train_epoch,
)

Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


def pruner(**settings: Any) -> SubsetPruner:
    """One by which the middle block of three dies after two epochs."""
    return SubsetPruner(own_net(), example=EXAMPLE, **{"epsilon": SHUT, **settings})


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# -- A loop of epochs


def test_a_dead_block_leaves_the_network_and_the_optimizer() -> None:
    made = pruner()
    model, optimizer = made.model, sgd(made)
    weight = weakref.ref(model.get_parameter("blocks.1.conv.weight"))
    died = []
    for _ in range(3):
        train_epoch(made, optimizer)
        died.append(made.end_epoch(HELDOUT, optimizer=optimizer).died)
    assert died == [(), ("blocks.1",), ()]
    assert made.model is model
    assert list(made.gates) == list(rewriting.gates(model)) == ["blocks.0", "blocks.2"]
    assert not any("blocks.1." in name for name in model.state_dict())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} == {id(p) for p in optimizer.state}
    gc.collect()
    assert weight() is None, "its memory is still held"


def test_a_death_carries_its_evidence() -> None:
    made = pruner()
    optimizer = sgd(made)
    for _ in range(2):
        train_epoch(made, optimizer)
        made.end_epoch(HELDOUT, optimizer=optimizer)
    death = made.tracker.records["blocks.1"].death
    assert death is not None
    assert (death.epoch, death.steps, death.samples) == (2, 2 * STEPS, 16)
    assert death.epsilon == SHUT
    assert 0 < death.heldout_peak < SHUT


OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "fused": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, fused=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01),
    "named": lambda m: torch.optim.Adagrad(m.named_parameters(), lr=0.01),
    "groups": lambda m: two_groups(m),
}


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    weights: dict[str, Any] = {"params": [p for p in model.parameters() if p.dim() > 1]}
    others = {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.1}
    return torch.optim.NAdam([weights, others], lr=0.01)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_removal_changes_nothing_that_survives(make: Optimizers) -> None:
    """Every optimizer ends in the weights that it reaches with the dead block in place, closed."""
    ends = []
    for live_removal in (True, False):
        made = pruner(live_removal=live_removal)
        optimizer = make(made.model)
        for _ in range(4):
            train_epoch(made, optimizer)
            made.end_epoch(HELDOUT, optimizer=optimizer)
        ends.append(dict(made.model.state_dict()))
    removed, kept = ends
    assert len(removed) < len(kept)
    assert_equal(removed, kept)


def test_a_step_runs_nothing_on_the_device() -> None:
    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, *rest: Any) -> Any:
            raise AssertionError(f"{function} was called")

    made = pruner()
    with Refusing():  # type: ignore[no-untyped-call]
        made.step()
    assert made.steps == 1


def test_a_gate_is_judged_in_every_pass_of_an_accumulated_step() -> None:
    """A block that one of the small batches needs stays alive."""
    made = BlockPruner(own_net(), example=EXAMPLE, epsilon=SHUT)
    optimizer = sgd(made, lr=0.0)
    made.model.train()
    for _ in range(3):
        for number, (images, labels) in enumerate(batches(4)):
            loss = nn.functional.cross_entropy(made.model(images), labels)
            loss.backward()
            if number == 1 and not made.epoch:
                made.gates["blocks.0"].set_epsilon(0.0)  # open for the rest of the first epoch
            if number % 2:
                optimizer.step()
                made.step()
        assert made.steps == 2
        summary = made.end_epoch(HELDOUT, optimizer=optimizer)
        record = made.tracker.records["blocks.0"]
        if record.death is None:
            assert record.steps == 4
        if made.epoch == 1:
            assert record.closed_steps == 2
        assert ("blocks.0" in summary.died) == (made.epoch == 3)


def test_a_schedule_of_epsilon() -> None:
    seen = []
    made = BlockPruner(own_net(), example=EXAMPLE, epsilon=lambda epoch: 2.5 if epoch else 0.0)
    optimizer = sgd(made, lr=0.0)
    for _ in range(2):
        seen.append({float(gate.epsilon) for gate in made.gates.values()})
        train_epoch(made, optimizer)
        assert made.end_epoch(HELDOUT).epsilon == max(seen[-1])
    assert seen == [{0.0}, {2.5}]


@pytest.mark.parametrize(
    "target",
    [eps_train.Parameters(0.6), eps_train.Flops(0.6), eps_train.Latency(0.6)],
    ids=str,
)
def test_a_target_is_reached_and_then_kept(target: Any) -> None:
    """Without learning the responses of an epoch are those of the one before."""
    with timed_by(LAYERS):
        made = BlockPruner(own_net(), example=EXAMPLE, target=target, epochs=6)
    optimizer = sgd(made, lr=0.0)
    shares = []
    for _ in range(12):
        train_epoch(made, optimizer)
        made.end_epoch(HELDOUT, optimizer=optimizer)
        shares.append(made.remaining)
    assert shares[0] == 1
    assert shares[-1] is not None
    assert 0.2 < shares[-1] <= 0.6
    assert len(made.gates) == 1, "and not more than it takes"


def test_accuracy_below_its_best_stops_the_pruning() -> None:
    made = BlockPruner(
        own_net(),
        example=EXAMPLE,
        target=eps_train.Parameters(0.6),
        epochs=50,
        max_accuracy_drop=1.0,
    )
    optimizer = sgd(made, lr=0.0)
    qualities = iter([0.9, *[0.5] * 6])
    for _ in range(7):
        train_epoch(made, optimizer)
        made.end_epoch(HELDOUT, metric=lambda model: next(qualities))
    assert made.controller is not None
    assert made.controller.held == 3, "after the fifth epoch, when it would choose, and since"
    assert made.remaining == 1
    # That accuracy is measured on the held-out labels where no metric is given.
    train_epoch(made, optimizer)
    accuracy = made.end_epoch(HELDOUT).accuracy
    logits = made.model.eval()(torch.cat([images for images, _ in HELDOUT]))
    labels = torch.cat([labels for _, labels in HELDOUT])
    assert accuracy == (logits.argmax(1) == labels).double().mean().item()


# -- Around it: averages, precision, compilers, processes


def test_averaged_weights_are_judged_and_lose_the_block_too() -> None:
    made = pruner()
    optimizer = sgd(made)
    average = AveragedModel(made.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        train_epoch(made, optimizer, after=lambda: average.update_parameters(made.model))
        made.end_epoch(HELDOUT, optimizer=optimizer, averaged=average)
    assert average.module.state_dict().keys() == made.model.state_dict().keys()
    ours, theirs = made.model.get_parameter("head.bias"), average.module.get_parameter("head.bias")
    assert not torch.equal(ours, theirs)
    saved = made.checkpoint(average)
    assert torch.equal(saved.state["head.bias"], theirs)
    assert saved.dead == ("blocks.1",)


def test_held_out_data_that_open_the_averaged_block_keep_it() -> None:
    """The gate judges the trained weights, the held-out data those that ship."""
    made = pruner()
    optimizer = sgd(made, lr=0.0)
    average = AveragedModel(made.model)
    with torch.no_grad():
        average.module.get_parameter("blocks.1.scale").fill_(1e10)
    for _ in range(3):
        train_epoch(made, optimizer)
        assert made.end_epoch(HELDOUT, averaged=average).died == ()
    assert made.tracker.records["blocks.1"].closed_steps == STEPS


def test_under_autocast_with_a_loss_scale() -> None:
    made = pruner()
    optimizer, scaler = sgd(made), torch.amp.GradScaler("cpu")
    for _ in range(3):
        made.model.train()
        for images, labels in batches():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(made.model(images), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            made.step()
        made.end_epoch(HELDOUT, optimizer=optimizer)
    assert list(made.gates) == ["blocks.0", "blocks.2"]
    assert all(p.dtype == torch.float32 for p in made.model.parameters())


def test_a_compiled_network_runs_what_is_left() -> None:
    made, plain = pruner(), pruner()
    compiled = torch.compile(made.model, backend="eager")
    optimizers = [sgd(made), sgd(plain)]
    for _ in range(4):
        for each, optimizer, call in zip((made, plain), optimizers, (compiled, None), strict=True):
            train_epoch(each, optimizer, call=call)
            each.end_epoch(HELDOUT, optimizer=optimizer)
    assert list(made.gates) == ["blocks.0", "blocks.2"]
    theirs = plain.model.state_dict()
    for name, tensor in made.model.state_dict().items():
        assert torch.allclose(tensor, theirs[name], atol=1e-5), name
    for training in (True, False):
        made.model.train(training)
        assert torch.allclose(compiled(EXAMPLE), made.model(EXAMPLE))


def test_frozen_layers_stay_as_they_are() -> None:
    net = own_net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    made = SubsetPruner(net, example=EXAMPLE, epsilon=SHUT)
    before = copy.deepcopy(dict(made.model.named_parameters()))
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    for _ in range(2):
        train_epoch(made, optimizer)
        made.end_epoch(HELDOUT, optimizer=optimizer)
    assert list(made.gates) == ["blocks.0", "blocks.2"]
    for name, parameter in made.model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("head"), name


def two_processes(group: Group, live_removal: bool) -> tuple[list[tuple[str, ...]], list[Tensor]]:
    """Train with DDP; in the first epoch one process alone needs `blocks.1`."""
    made = pruner(live_removal=live_removal)
    optimizer = sgd(made)
    wrapped = DistributedDataParallel(made.model)
    died = []
    for _ in range(4):
        if group.rank and not made.epoch:
            made.gates["blocks.1"].set_epsilon(0.0)
        data = batches(seed=10 + group.rank)
        train_epoch(made, optimizer, call=wrapped, data=data)
        summary = made.end_epoch(HELDOUT, optimizer=optimizer)
        if summary.died and live_removal:
            wrapped = DistributedDataParallel(made.model)
        died.append(summary.died)
    return died, [parameter.detach() for parameter in made.model.parameters()]


@pytest.mark.parametrize("live_removal", [True, False])
def test_processes_judge_together(live_removal: bool) -> None:
    one, other = processes.run(two_processes, live_removal)
    assert one[0] == other[0] == [(), (), ("blocks.1",), ()]
    assert all(map(torch.equal, one[1], other[1]))


# -- Resuming


def saved(made: BlockPruner, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a user's checkpoint holds, written and read."""
    file = io.BytesIO()
    parts: dict[str, Any] = {"model": made.model, "optimizer": optimizer, "pruner": made}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("early", [True, False])
def test_a_resumed_run_ends_in_the_same_weights(stop: int, early: bool) -> None:
    """Stopped before and after the block died; the optimizer is made before or after loading."""
    settings: dict[str, Any] = {"criterion": "gradient"}
    whole = pruner(**settings)
    optimizer = sgd(whole)
    for epoch in range(5):
        if epoch == stop:
            state = saved(whole, optimizer)
        train_epoch(whole, optimizer)
        whole.end_epoch(HELDOUT, optimizer=optimizer)
    again = pruner(**settings)
    if early:
        resumed = sgd(again)
        again.load_state_dict(state["pruner"], optimizer=resumed)
    else:
        again.load_state_dict(state["pruner"])
        resumed = sgd(again)
    again.model.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    while again.epoch < 5:
        train_epoch(again, resumed)
        again.end_epoch(HELDOUT, optimizer=resumed)
    assert_equal(dict(again.model.state_dict()), dict(whole.model.state_dict()))
    assert again.tracker.records == whole.tracker.records
    assert_equal(again.checkpoint().state, whole.checkpoint().state)


def test_a_run_resumed_in_the_middle_of_an_epoch() -> None:
    ends = []
    for cut in (False, True):
        made = pruner()
        optimizer = sgd(made)
        for epoch in range(2):
            train_epoch(made, optimizer, data=batches()[:1])
            if cut and epoch:
                state = saved(made, optimizer)
                made = pruner()
                optimizer = sgd(made)
                made.load_state_dict(state["pruner"], optimizer=optimizer)
                made.model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
            train_epoch(made, optimizer, data=batches()[1:])
            made.end_epoch(HELDOUT, optimizer=optimizer)
        ends.append(made)
    assert ends[0].tracker.records == ends[1].tracker.records
    assert_equal(dict(ends[0].model.state_dict()), dict(ends[1].model.state_dict()))


# -- Bad use: one clear line


class Plain(nn.Module):
    """A network without a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.two(self.one(x).mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": Plain()}, "Plain: has no residual addition"),
        ({"epsilon": None}, "give either target= or epsilon="),
        ({"target": eps_train.Parameters(0.5)}, "give either target= or epsilon="),
        ({"epsilon": -1.0}, r"epsilon=-1\.0: must be finite and above 0"),
        ({"patience": 1}, "patience= must be at least 2"),
        ({"criterion": "magic"}, "criterion='magic': choose one of response, relative"),
        ({"example": EXAMPLE[0]}, r"example=: must be a batch of normalised images \[N, C, H, W\]"),
        ({"mean": (0.5, 0.5)}, "mean=: has 2 values, the images 1 channels"),
        ({"example": torch.zeros(2, 3, 8, 8)}, "OwnNet: does not run on inputs of 3x8x8"),
        (
            {"epsilon": None, "target": eps_train.Parameters(0.1)},
            r"Parameters\(0\.1\) cannot be met: every stage keeps a block, and that leaves",
        ),
    ],
)
def test_arguments_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    arguments = {"model": own_net(), "example": EXAMPLE, "epsilon": 1.0, **settings}
    with pytest.raises((ConfigError, GraphError), match=message) as raised:
        BlockPruner(arguments.pop("model"), **arguments)
    assert "\n" not in str(raised.value)


def test_a_compiled_network_is_refused() -> None:
    compiled: Any = torch.compile(own_net(), backend="eager")
    with pytest.raises(ConfigError, match=r"wrap or compile pruner\.model instead"):
        BlockPruner(compiled, example=EXAMPLE, epsilon=1.0)


@pytest.mark.parametrize("share", [0.0, 1.0, 50])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(ConfigError, match="must be between 0 and 1, the share to keep"):
        eps_train.Flops(share)


@pytest.mark.parametrize(
    ("steps", "arguments", "message"),
    [
        (False, {}, r"no step since the epoch began; call pruner\.step\(\) after each"),
        (True, {"heldout": []}, "heldout: is empty"),
        (True, {"heldout": iter([])}, "heldout: is empty"),
        (
            True,
            {"optimizer": torch.optim.SGD(own_net().parameters(), lr=0.1)},
            r"holds no parameter of the network; make it from pruner\.model\.parameters\(\)",
        ),
        (True, {"averaged": own_net()}, "averaged=: holds no copy of the network"),
    ],
)
def test_an_epoch_that_cannot_be_judged(
    steps: bool, arguments: dict[str, Any], message: str
) -> None:
    made = pruner()
    optimizer = sgd(made)
    if steps:
        train_epoch(made, optimizer)
    before = made.state_dict()["tracker"]
    with pytest.raises(ConfigError, match=message):
        made.end_epoch(**{"heldout": HELDOUT, **arguments})
    assert made.state_dict()["tracker"] == before
    assert made.epoch == 0


def test_a_network_that_was_not_trained_in_training_mode() -> None:
    made = pruner()
    made.model.eval()(EXAMPLE)
    made.step()
    with pytest.raises(ConfigError, match="saw no forward pass in training mode"):
        made.end_epoch(HELDOUT)


def test_labels_are_needed_for_an_accuracy() -> None:
    made = BlockPruner(
        own_net(), example=EXAMPLE, target=eps_train.Parameters(0.6), max_accuracy_drop=1.0
    )
    train_epoch(made, sgd(made))
    with pytest.raises(ConfigError, match=r"max_accuracy_drop needs labels; yield \(images, lab"):
        made.end_epoch([EXAMPLE])


def test_the_state_of_another_pruner_is_refused() -> None:
    state = BlockPruner(own_net(), example=EXAMPLE, target=eps_train.Parameters(0.6)).state_dict()
    with pytest.raises(ConfigError, match="of a pruner with another target or criterion"):
        pruner().load_state_dict(state)
    torch.manual_seed(0)
    from tests.train.loops import OwnNet

    other = BlockPruner(OwnNet(blocks=2), example=EXAMPLE, epsilon=1.0)
    with pytest.raises(ConfigError, match=r"of another network, which differs in blocks\.2"):
        other.load_state_dict(pruner().state_dict())


# -- Files


def dead_pruner() -> BlockPruner:
    made = pruner()
    for _ in range(2):
        train_epoch(made, optimizer := sgd(made))
        made.end_epoch(HELDOUT, optimizer=optimizer)
    return made


def test_a_saved_network_is_rebuilt_from_its_name(tmp_path: Any) -> None:
    made = dead_pruner()
    made.save(tmp_path / "ckpt.pt", network="tests.train.loops:OwnNet")
    found = eps_train.Checkpoint.load(tmp_path / "ckpt.pt")
    assert found.dead == ("blocks.1",)
    assert found.network.family == "tests.train.loops:OwnNet"
    built = found.build_gated().eval()
    assert torch.equal(built(EXAMPLE), made.model.eval()(EXAMPLE))
    assert found.data.classes == tuple("0123456789")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "tests.train.smooth:Smooth"}, "it has other residual blocks"),
        ({"network": "tests.train.loops:own_net"}, "none of the arguments num_classes"),
        (
            {"network": "tests.train.loops:OwnNet", "data": "mnist"},
            "mnist|no such|missing",
        ),
    ],
)
def test_a_network_or_data_set_that_is_another_one(
    tmp_path: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        dead_pruner().save(tmp_path / "ckpt.pt", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_network_without_a_name_is_stored_as_a_graph(tmp_path: Any) -> None:
    made = dead_pruner()
    made.save(tmp_path / "ckpt.pt")
    built = eps_train.Checkpoint.load(tmp_path / "ckpt.pt").build_gated().eval()
    assert torch.equal(built(EXAMPLE), made.model.eval()(EXAMPLE))


def test_a_layer_with_code_of_its_own_needs_a_name(tmp_path: Any) -> None:
    class Scaled(nn.Conv2d):
        """A layer that computes something else than the one that it derives from."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(x)

    network = own_net()
    network.blocks[0].conv = Scaled(4, 4, 3, padding=1, bias=False)
    made = BlockPruner(network, example=EXAMPLE, epsilon=1.0)
    message = r"^save\(\): blocks\.0\.conv: .*Scaled is no layer of torch\.nn.*give network="
    with pytest.raises(ConfigError, match=message):
        made.save(tmp_path / "ckpt.pt")
    assert not list(tmp_path.iterdir())


def test_data_gives_the_images_and_the_user_the_normalisation(tmp_path: Any) -> None:
    made = SubsetPruner(own_net(), example=EXAMPLE, epsilon=1.0, mean=0.5, std=0.25)
    made.save(tmp_path / "ckpt.pt", network="tests.train.loops:OwnNet", data="digits")
    found = eps_train.Checkpoint.load(tmp_path / "ckpt.pt").data
    assert (found.name, found.mean, found.std) == ("digits", (127.5,), (63.75,))
    assert found.sizes["test"] == 359


def test_the_graph_is_an_fx_module_that_can_be_copied() -> None:
    made = dead_pruner()
    assert isinstance(made.model, fx.GraphModule)
    copied = copy.deepcopy(made.model).eval()
    assert torch.equal(copied(EXAMPLE), made.model.eval()(EXAMPLE))
