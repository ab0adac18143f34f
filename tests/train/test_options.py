"""What each option of eps-train does to a run, observed from outside through the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from eps_core.stats import Interval
from eps_train.cli import main
from eps_train.data import dataset
from eps_train.gating import controller, costs
from eps_train.gating.costs import count_costs, measure_latency
from eps_train.gating.pruner import GraphPruner
from eps_train.gating.pruning_state import BlockScores
from eps_train.training import forward, trainer
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.distributed import Group
from eps_train.training.evaluate import Score
from eps_train.training.step import TrainingStep
from eps_train.training.trainer import Trainer
from tests.commands import Result, run
from tests.train.gating.timers import LAYERS, NO_ORT, LayerTimer, timed_by

EPOCHS = 2
NEVER_DEAD = ("--patience", 99)


@dataclass(frozen=True)
class Trained:
    """A finished run: its folder and what the command said."""

    folder: Path
    result: Result

    @property
    def best(self) -> Checkpoint:
        return Checkpoint.load(self.folder / "ckpt.pt")

    @property
    def last(self) -> dict[str, Tensor]:
        """The tensors at the end of the run."""
        return dict(Checkpoint.load(self.folder / "last.pt").state)

    def epochs(self, key: str) -> list[Any]:
        """One figure of every epoch, from metrics.jsonl."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)[key] for line in lines]


Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in colour, 48 images in each of two classes."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in ("dark", "light"):
        (folder / name).mkdir()
        for index in range(48):
            pixels = random.integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def reference(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run that the others differ from in one option."""
    return _train(images, tmp_path_factory.mktemp("reference"))


@pytest.fixture
def train(images: Path, tmp_path: Path) -> Train:
    return lambda *args: _train(images, tmp_path, *args)


def _train(images: Path, folder: Path, *args: object) -> Trained:
    small = ("--recipe", "digits", "--dataset", f"folder:{images}", "--model", "cifar:8x4")
    plain = ("--epochs", EPOCHS, "--batch-size", 32, "--shift", 0, "--device", "cpu")
    result = run("eps-train", main, *small, *plain, *args, cwd=folder)
    assert result.code == 0, result.stderr
    return Trained(folder, result)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The images of every training step, uint8 `[N, C, H, W]`."""
    seen: list[Tensor] = []
    step = TrainingStep.__call__

    def watched(self: TrainingStep, batch: Any) -> Tensor:
        seen.append(batch.images.clone())
        return step(self, batch)

    monkeypatch.setattr(TrainingStep, "__call__", watched)
    return seen


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> str:
    """A block of cifar:14x4 whose gate is closed on every step, whatever it answers."""
    block = "stages.1.1"

    def thresholds(self: GraphPruner, epoch: int) -> dict[str, float]:
        return {name: 1e9 if name == block else 0.0 for name in self.gates}

    monkeypatch.setattr(GraphPruner, "thresholds", thresholds)
    return block


def same(first: Trained, second: Trained) -> bool:
    one, other = first.last, second.last
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def norm(trained: Trained) -> float:
    """Of all weights of convolutions together."""
    return sum(float(t.square().sum()) for t in trained.last.values() if t.dim() == 4)


# -- the run -------------------------------------------------------------------------------------


def test_two_runs_alike_give_the_same_tensors(train: Train, reference: Trained) -> None:
    """So a difference below is the option's doing."""
    assert same(train(), reference)


@pytest.mark.parametrize(
    "option",
    [
        ("--seed", 7),
        ("--batch-size", 16),
        ("--momentum", 0.5),
        ("--nesterov",),
        ("--aux-loss-weight", 0.9),
        ("--optimizer", "adamw"),
        ("--clip-grad-norm", 0.1),
        ("--label-smoothing", 0.2),
        ("--ema", 0.5),
        ("--accumulate", 2),
        ("--random-erasing", 0.5),
        ("--mixup", 0.2),
        ("--cutmix", 1),
    ],
    ids=lambda option: str(option[0]),
)
def test_the_tensors_are_others(train: Train, reference: Trained, option: tuple[object]) -> None:
    assert not same(train(*option), reference)


def test_epochs_and_batches_are_as_many_as_asked_for(train: Train, reference: Trained) -> None:
    steps = [gates["stages.0.0"]["steps"] for gates in reference.epochs("gates")]
    trained = train("--epochs", 3, "--batch-size", 16)
    halved = [gates["stages.0.0"]["steps"] for gates in trained.epochs("gates")]
    assert (steps, halved) == ([2] * EPOCHS, [4] * 3)


def test_a_folder_has_a_recipe_of_its_own(images: Path, tmp_path: Path) -> None:
    args = ("--dataset", f"folder:{images}", "--model", "cifar:8x4", "--epochs", 1)
    result = run("eps-train", main, *args, cwd=tmp_path)
    assert result.code == 0, result.stderr
    assert "recipe: images" in result.stderr
    config = Checkpoint.load(tmp_path / "ckpt.pt").config
    assert (config["recipe"], config["weight_decay"]) == ("images", 5e-3)
    tuned = ("--weights", tmp_path / "ckpt.pt", "--image-size", 9, "--output", tmp_path / "tuned")
    result = run("eps-train", main, *args[:-1], 3, *tuned, cwd=tmp_path)
    assert result.code == 0, result.stderr
    assert "recipe: finetune" in result.stderr


def test_data_root_takes_the_place_of_the_folder(images: Path, tmp_path: Path) -> None:
    args = ("--dataset", "folder:moved", "--dry-run")
    assert "moved" in run("eps-train", main, *args, cwd=tmp_path).error
    result = run("eps-train", main, *args, "--data-root", images, cwd=tmp_path)
    assert result.code == 0, result.stderr


@pytest.mark.parametrize(("fit", "edge"), [("crop", False), ("letterbox", True)])
def test_the_edges_of_images_are_trained_on(
    fit: str, edge: bool, tmp_path: Path, batches: list[Tensor]
) -> None:
    random = np.random.default_rng(0)
    for name, value in (("dark", 0), ("light", 255)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(8):
            pixels = random.integers(90, 140, (8, 32), dtype=np.uint8)
            pixels[:, :8] = value  # the mark, at the left edge of a wide image
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{index}.png")
    size = ("--image-size", "8", "--batch-size", 4, "--fit", fit)
    _train(tmp_path / "set", tmp_path, *size)
    assert (min(int(batch.min()) for batch in batches) < 20) is edge
    identity = Checkpoint.load(tmp_path / "ckpt.pt").data
    assert identity.preprocessing.fit == fit
    assert dataset.load_again(identity).identity == identity
    resumed = ("--resume", "--epochs", EPOCHS + 1)
    common = ("--recipe", "digits", "--dataset", f"folder:{tmp_path / 'set'}", "--shift", 0)
    other = {"crop": "letterbox", "letterbox": "crop"}[fit]
    again = ("--model", "cifar:8x4", *size[:-1], other, *resumed)
    result = run("eps-train", main, *common, *again, cwd=tmp_path)
    assert result.code == 1
    assert "fit" in result.error


def test_the_device_is_the_one_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(Exception):
        pass

    def told(*args: object, device: torch.device, **rest: object) -> None:
        raise Told(str(device))

    monkeypatch.setattr("eps_train.training.run.Run.__init__", told)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for given, expected in (("cpu", "cpu"), ("cuda:3", "cuda:3"), ("auto", "cuda")):
        with pytest.raises(Told, match=f"^{expected}$"):
            _train(images, tmp_path, "--device", given)


def test_so_many_threads_take_each_step(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    step = TrainingStep.__call__

    def counted(self: TrainingStep, batch: Any) -> Tensor:
        counts.append(torch.get_num_threads())
        return step(self, batch)

    monkeypatch.setattr(TrainingStep, "__call__", counted)
    before = torch.get_num_threads()
    try:
        train("--epochs", 1, "--cpu-threads", 3)
    finally:
        torch.set_num_threads(before)
    assert set(counts) == {3}


def test_the_last_epochs_are_kept(train: Train) -> None:
    kept = train("--keep", 1).folder.glob("epoch-*.pt")
    assert [path.name for path in kept] == [f"epoch-{EPOCHS:04}.pt"]


def test_the_network_is_trained_through_the_compiler(
    train: Train, monkeypatch: pytest.MonkeyPatch, reference: Trained
) -> None:
    compiled: list[nn.Module] = []

    def compiler(network: nn.Module, **options: Any) -> nn.Module:
        compiled.append(network)
        return network

    monkeypatch.setenv("CXX", sys.executable)  # any program will do
    monkeypatch.setattr(torch, "compile", compiler)
    assert same(train("--compile"), reference)
    assert compiled


def test_batch_norm_is_synchronised(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's network goes through the function that a GPU's would go through."""
    made: list[nn.Module] = []

    def synchronise(network: nn.Module, group: Group, device: torch.device) -> None:
        several = Group()
        several.size = 2
        forward.synchronise_batchnorm(network, several, torch.device("cuda"))
        made.append(network)

    def stop(self: Trainer, report: object) -> None:
        raise KeyboardInterrupt  # torch has no such batch norm on a CPU

    monkeypatch.setattr("eps_train.training.step.synchronise_batchnorm", synchronise)
    monkeypatch.setattr(Trainer, "run", stop)
    with pytest.raises(AssertionError, match="interrupted"):
        train("--sync-batchnorm")
    kinds = {type(module) for module in made[0].modules() if "BatchNorm" in type(module).__name__}
    assert kinds == {nn.SyncBatchNorm}


# -- the optimiser -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "lr_schedule"),
    [
        (("--lr-schedule", "0:0.05,1:0.03", "--final-decay", "none"), [0.05, 0.03]),
        (("--lr-schedule", "0:0.05", "--final-decay", "0.5:0.004"), [0.05, 0.004]),
        # All gates are closed in the first epoch, so it has lost blocks.
        (
            (
                "--lr-schedule",
                "0:0.05",
                "--lr-restart",
                "0:0.02",
                "--final-decay",
                "none",
                "--epsilon",
                1e9,
            ),
            [0.05, 0.02],
        ),
        (("--lr-schedule", "cosine:0.1"), [0.0853553, 0.0146447]),  # half-way through each epoch
        (("--lr-schedule", "0:0.05", "--final-decay", "none", "--lr-warmup", 2), [0.0125, 0.0375]),
    ],
    ids=["--lr-schedule", "--final-decay", "--lr-restart", "cosine", "--lr-warmup"],
)
def test_the_rate_of_every_epoch(
    train: Train, options: tuple[object, ...], lr_schedule: list[float]
) -> None:
    assert train(*options, *NEVER_DEAD).epochs("rate") == pytest.approx(lr_schedule, rel=1e-4)


def test_adamw_is_torchs_with_decay_on_weights_alone(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.optim.Optimizer] = []
    adamw = torch.optim.AdamW

    def watched(*args: Any, **options: Any) -> torch.optim.Optimizer:
        made.append(adamw(*args, **options))
        return made[-1]

    monkeypatch.setattr(torch.optim, "AdamW", watched)
    train("--optimizer", "adamw", "--momentum", 0.8, "--weight-decay", 0.05, "--epochs", 1)
    (optimizer,) = made
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.999)}


def test_gradients_are_clipped_before_the_step(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD, *args: Any) -> Any:
        found = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm([g for g in found if g is not None])))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    train("--clip-grad-norm", 0.05)
    assert norms == pytest.approx([0.05] * len(norms), rel=1e-3)


def test_labels_are_smoothed_in_both_losses(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    loss = torch.nn.functional.cross_entropy

    def watched(logits: Tensor, labels: Tensor, **rest: Any) -> Tensor:
        seen.append(rest.get("label_smoothing", 0.0))
        return loss(logits, labels, **rest)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", watched)
    train("--label-smoothing", 0.2, "--epochs", 1)
    assert seen.count(0.2) == 4  # two steps, network and side head
    assert seen.count(0.0) == 2  # validation and test


def test_weights_decay(train: Train, reference: Trained) -> None:
    assert norm(train("--weight-decay", 1)) < 0.7 * norm(reference)


def test_without_weight_there_is_no_side_head(train: Train, reference: Trained) -> None:
    assert reference.best.side_head is not None
    assert train("--aux-loss-weight", 0).best.side_head is None


# -- the input -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(images: Path) -> set[bytes]:
    """Every training image as it is."""
    return {image.numpy().tobytes() for image in dataset.load(f"folder:{images}").train.images}


def among(batches: list[Tensor], originals: set[bytes]) -> tuple[int, int]:
    """How many of the images trained on are originals, and of how many."""
    seen = torch.cat(batches)
    return sum(image.contiguous().numpy().tobytes() in originals for image in seen), len(seen)


def test_images_stay_as_they_are(
    train: Train, batches: list[Tensor], originals: set[bytes]
) -> None:
    train("--no-flip", "--shift", 0, "--augmentation", "shift")
    found, total = among(batches, originals)
    assert found == total


def test_images_are_mirrored(train: Train, batches: list[Tensor], originals: set[bytes]) -> None:
    train("--flip")
    found, total = among(batches, originals)
    back, _ = among([batch.flip(3) for batch in batches], originals)
    assert found + back == total
    assert back > total / 5


def test_images_are_shifted(train: Train, batches: list[Tensor], originals: set[bytes]) -> None:
    train("--shift", 2)
    found, total = among(batches, originals)
    assert found < total / 5  # one place in 25 is the old one
    seen = torch.cat(batches)
    middles = {image[:, 2:-2, 2:-2].tobytes() for image in map(_array, originals)}
    assert seen.shape[1:] == (3, 9, 9)
    assert any(
        seen[i, :, r : r + 5, c : c + 5].numpy().tobytes() in middles
        for i in range(len(seen))
        for r, c in ((0, 0), (4, 4))
    ), "some image lies in a corner"


def _array(content: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(content, np.uint8).reshape(3, 9, 9)


@pytest.mark.parametrize("augmentation", ["svhn", "imagenet", "trivial"])
def test_images_are_augmented_otherwise(
    train: Train, batches: list[Tensor], originals: set[bytes], augmentation: str
) -> None:
    train("--augmentation", augmentation)
    found, total = among(batches, originals)
    assert found < (total / 3 if augmentation == "trivial" else 1)  # one operation is none


def test_rare_classes_weigh_more(
    train: Train, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    loss = torch.nn.functional.cross_entropy

    def watched(logits: Tensor, labels: Tensor, **rest: Any) -> Tensor:
        if rest.get("weight") is not None:
            seen.append(rest["weight"])
        return loss(logits, labels, **rest)

    uneven = tmp_path / "uneven"
    for name, count in (("dark", 48), ("light", 12)):
        (uneven / name).mkdir(parents=True)
        for index in range(count):
            (uneven / name / f"{index}.png").symlink_to(images / name / f"{index}.png")
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", watched)
    train("--dataset", f"folder:{uneven}", "--class-weights", "balanced", "--epochs", 1)
    (dark, light), *_ = seen
    assert light / dark == pytest.approx(4, rel=0.2)


def test_the_mean_image_is_taken_off(train: Train, reference: Trained, images: Path) -> None:
    assert reference.best.data.normalization == "channel"
    identity = train("--normalization", "pixel").best.data
    mean = dataset.load(f"folder:{images}").train.images.double().mean(dim=0)
    assert torch.allclose(torch.tensor(identity.mean, dtype=torch.float64), mean)
    assert identity.std == (128.0,) * 3


# -- the threshold -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "epsilons"),
    [
        (("--epsilon", 1.5), [1.5, 1.5]),
        (("--epsilon-warmup", 1), [0.0, 2.5]),
        (("--freeze-gates-at", 0.5), [2.5, 0.0]),
    ],
    ids=["--epsilon", "--epsilon-warmup", "--freeze-gates-at"],
)
def test_the_threshold_of_every_epoch(
    train: Train, options: tuple[object, ...], epsilons: list[float]
) -> None:
    assert train(*options, *NEVER_DEAD).epochs("epsilon") == epsilons


def test_a_response_within_epsilon_closes_the_gate(train: Train) -> None:
    for gates in train("--epsilon", 1e9, *NEVER_DEAD).epochs("gates"):
        assert all(gate["closed"] == gate["steps"] == 2 for gate in gates.values())


def test_a_response_relative_to_the_input_is_judged(train: Train) -> None:
    """With open gates the run is the same; the gates recorded other responses."""
    open_gates = ("--epsilon", 1e-30, *NEVER_DEAD)
    trained = train(*open_gates, "--relative-epsilon")
    relative, records, weights = trained.epochs("gates"), trained.best.gates, norm(trained)
    trained = train(*open_gates, "--force")
    absolute = trained.epochs("gates")
    assert weights == norm(trained)
    for block in absolute[0]:
        assert relative[0][block]["peak"] != pytest.approx(absolute[0][block]["peak"], rel=1e-3)
    assert [relative[1][record.block]["peak"] for record in records] == [r.peak for r in records]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epsilon", 0), "--relative-epsilon only applies to runs that prune"),
        (("--nested",), "--relative-epsilon only applies to runs that prune"),
        ((), "--relative-epsilon: the recipe's epsilon of 2.5 has another unit; give --epsilon"),
    ],
)
def test_a_relative_epsilon_needs_a_threshold(
    tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    result = run("eps-train", main, "--relative-epsilon", *options, cwd=tmp_path)
    assert result.code == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_target_leads_the_threshold(train: Train) -> None:
    """It rises to just above the weakest block's response in the epoch before."""
    trained = train("--target-parameters", 0.8, "--model", "cifar:14x4", "--final-decay", "none")
    first, second = trained.epochs("epsilon")
    weakest = min(gate["peak"] for gate in trained.epochs("gates")[0].values())
    assert first == 0
    assert second >= 1.05 * weakest * (1 - 1e-6)


@pytest.fixture
def certain_deaths(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever is chosen dies; a block costs a millisecond or two for each of its convolutions."""
    monkeypatch.setattr(controller, "MARGIN", 1e6)
    with timed_by(LAYERS):
        yield


@pytest.mark.usefixtures("certain_deaths")
@pytest.mark.parametrize(
    ("option", "value", "unit"),
    [
        ("--target-parameters", 0.6, "parameters"),
        ("--target-flops", 0.6, "FLOPs"),
        ("--target-latency", 0.6, "latency"),
        ("--target-speedup", 1.5, "latency"),
    ],
)
def test_a_target_is_met_within_the_cost_of_a_block(
    train: Train, option: str, value: float, unit: str
) -> None:
    long = ("--epochs", 6, "--final-decay", "none", "--json")
    trained = train(option, value, "--model", "cifar:14x4", *long)
    (summary,) = json.loads(trained.result.stdout)["runs"]
    found = summary["target"]
    asked = 1 / value if value > 1 else value
    assert (found["option"], found["asked"]) == (f"{option} {value:g}", asked)
    assert found["measured"] == pytest.approx(found["predicted"])
    network = trained.best.network.skeleton()
    if unit == "latency":
        image = torch.zeros(1, 3, 9, 9, dtype=torch.uint8)
        costed = measure_latency(network, image, LayerTimer())
        assert found["timer"] == LayerTimer.name
    else:
        costed = count_costs(network, (3, 9, 9), found["currency"])
    assert found["predicted"] == costed.without(trained.best.dead) / costed.whole
    largest = max(costed.blocks.values()) / costed.whole
    assert asked - largest < found["predicted"] <= asked
    told = trained.result.stderr
    assert f"target: {asked:.1%} of the {unit} ({option} {value:g}), " in told
    line = f"{unit}: {asked:.1%} asked for ({option} {value:g}), {found['predicted']:.1%} predicted"
    assert line in told
    assert "cannot be reached" not in told
    assert ("latency" in told[told.index("Trained") :]) is (unit == "latency")


@pytest.mark.usefixtures("certain_deaths")
def test_a_latency_that_turns_out_longer_is_warned_of(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = Interval(0.9, 0.89, 0.91)
    monkeypatch.setattr("eps_train.training.run.latency_share", lambda *_: longer)
    long = ("--epochs", 6, "--final-decay", "none")
    trained = train("--target-latency", 0.8, "--model", "cifar:14x4", *long)
    told = " ".join(trained.result.stderr.split())
    assert "% predicted, 90.0% measured (89.0% to 91.0%; a millisecond a convolution)" in told
    assert "warning: the measured latency is 10.0 points above the target; eps-comp" in told
    assert "; eps-compact ckpt.pt --target-latency 0.8 prunes further" in told


@pytest.mark.usefixtures("certain_deaths")
def test_a_run_ends_well_where_its_latency_cannot_be_measured_again(train: Train) -> None:
    """As where it is resumed on another machine."""
    long = ("--epochs", 6, "--final-decay", "none", "--model", "cifar:14x4")
    target = ("--target-latency", 0.8, "--timer", "ort")
    train(*target, *long)
    with timed_by(NO_ORT):
        told = train(*target, *long, "--resume", "--json").result
    assert "% predicted, not measured (--timer ort: onnxruntime is not installed" in told.stderr
    assert json.loads(told.stdout)["runs"][0]["target"]["measured"] is None


def test_a_nested_run_orders_its_blocks(train: Train) -> None:
    trained = train("--nested", "--model", "cifar:14x4")
    assert sorted(trained.best.order) == sorted(trained.best.network.gated)
    assert set(trained.epochs("epsilon")) == {0}


def test_a_target_that_no_run_reaches_is_said_with_its_deviation(train: Train) -> None:
    with timed_by(LAYERS):
        told = train("--target-speedup", 9).result.stderr
    assert "warning: --target-speedup 9 cannot be reached: every stage keeps a block" in told
    assert "leaves 100% of the latency" in told
    assert "warning: 100.0% of the latency is left, not 11.1%" in told


def test_blocks_are_timed_in_the_runtime_that_is_named(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "SECONDS_EACH", 0.0)
    with timed_by(LAYERS):
        trained = train("--target-latency", 0.6, "--timer", "torch", "--json")
    (summary,) = json.loads(trained.result.stdout)["runs"]
    assert summary["target"]["timer"].startswith("torch ")
    assert "ms a block (torch " in trained.result.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ("--target-flops", 0.5, "--target-latency", 0.5),
            1,
            "--target-flops and --target-latency contradict each other: a run has one target",
        ),
        (
            ("--target-latency", 0.5, "--target-speedup", 2),
            1,
            "--target-latency and --target-speedup contradict each other",
        ),
        (("--target-speedup", 2, "--epsilon", 1), 1, "--epsilon and --target-speedup contradict"),
        (("--target-flops", 0.5, "--nested"), 1, "--nested and --target-flops contradict"),
        (("--target-flops", 0), 2, "--target-flops"),
        (("--target-latency", 1), 2, "--target-latency"),
        (("--target-speedup", 1), 2, "--target-speedup"),
        (("--target-speedup", "inf"), 1, "--target-speedup inf: must be finite and above 1"),
        (("--target-latency", "nan"), 1, "--target-latency nan: must be 0 to 1, both excluded"),
        (("--target-latency", 0.5, "--timer", "sun"), 2, "'sun' is not one of 'ort', 'torch'"),
        (("--timer", "ort"), 1, "--timer only applies to --target-latency and --target-speedup"),
        (("--target-flops", 0.5, "--timer", "ort"), 1, "--timer only applies to --target-latency"),
        (("--target-latency", 0.5, "--timer", "ort"), 1, "pip install 'eps-resnet[ort]'"),
    ],
)
def test_targets_and_timers_that_are_refused(
    tmp_path: Path, options: tuple[object, ...], code: int, message: str
) -> None:
    small = ("--epochs", 1, "--model", "cifar:8x4")
    with timed_by(NO_ORT):
        result = run("eps-train", main, *options, *small, cwd=tmp_path)
    assert result.code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_criterion_chooses_the_block(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    least = "stages.2.1"  # large enough to reach the target by itself
    read = BlockScores.read

    def other(self: BlockScores, *args: Any) -> dict[str, float]:
        assert self.criterion == "gradient"
        found = read(self, *args)
        assert all(score > 0 for score in found.values())
        return {block: float(block != least) for block in found}

    monkeypatch.setattr(BlockScores, "read", other)
    target = ("--target-parameters", 0.8, "--model", "cifar:14x4", "--final-decay", "none")
    trained = train(*target, "--criterion", "gradient")
    peak = trained.epochs("gates")[0][least]["peak"]
    assert trained.epochs("epsilon")[1] == pytest.approx(1.05 * peak)


def test_a_teacher_is_followed(reference: Trained, train: Train) -> None:
    teacher = reference.folder / "ckpt.pt"
    trained = train("--teacher", teacher)
    assert trained.best.metrics["teacher"] == reference.best.digest
    assert not same(trained, reference)


def test_the_network_teaches_itself_once_pruning_begins(train: Train, reference: Trained) -> None:
    assert not same(train("--self-distillation", "--epsilon-warmup", 1), reference)


def test_the_head_is_trained_first(train: Train, reference: Trained) -> None:
    start = ("--weights", reference.folder / "ckpt.pt")
    trained = train(*start, "--head-epochs", 1, "--epsilon-warmup", 2, "--epochs", 1)
    before, after = reference.best.state, trained.last
    moved = {name for name in before if before[name].dim() > 1} & {
        name for name in after if not torch.equal(after[name], before[name])
    }
    assert moved == {"classifier.weight"}
    assert "a learning rate of 0.1 destroys pretrained weights" in trained.result.stderr
    assert "the last layer alone was trained; eps-compact ckpt.pt --sweep" in trained.result.stderr


def test_zero_epochs_evaluate_the_weights_as_they_are(train: Train, reference: Trained) -> None:
    checkpoint = reference.folder / "ckpt.pt"
    as_before = ("--epochs", 0, "--normalization", "pretrained")
    trained = train("--weights", checkpoint, *as_before, "--ema", 0.9)
    before, after = reference.best, trained.best
    assert all(torch.equal(after.state[n], t) for n, t in before.state.items() if t.dim() > 1)
    assert after.metrics["test"] == before.metrics["test"]
    assert (after.data.mean, after.data.std) == (before.data.mean, before.data.std)
    assert "nothing was trained; eps-compact ckpt.pt --sweep" in trained.result.stderr


def test_zero_epochs_and_a_head_first_need_weights(images: Path, tmp_path: Path) -> None:
    args = ("--dataset", f"folder:{images}", "--model", "cifar:8x4")
    for option in (("--epochs", 0), ("--head-epochs", 1, "--epsilon-warmup", 2)):
        result = run("eps-train", main, *args, *option, cwd=tmp_path)
        assert result.code == 1
        assert "only applies to a network with weights; give --pretrained or" in result.error


@pytest.mark.parametrize("temperature", [1, 10])
def test_a_temperature_softens_both(
    train: Train, reference: Trained, monkeypatch: pytest.MonkeyPatch, temperature: int
) -> None:
    seen = []

    def loss(student: Tensor, teacher: Tensor, found: float) -> Tensor:
        seen.append(found)
        return student.sum() * 0

    monkeypatch.setattr("eps_train.training.step.distillation_loss", loss)
    train("--teacher", reference.folder / "ckpt.pt", "--temperature", temperature)
    assert set(seen) == {temperature}


def test_without_weight_a_teacher_changes_nothing(reference: Trained, train: Train) -> None:
    teacher = reference.folder / "ckpt.pt"
    trained = train("--teacher", teacher, "--distillation-weight", 0)
    assert same(trained, reference)


@pytest.mark.parametrize("guarded", [False, True])
def test_a_drop_in_accuracy_holds_the_target_back(
    train: Train, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """The best epoch is the first, and from the second on the accuracy is half of that."""
    accuracies = iter([0.8] + [0.4] * 99)
    monkeypatch.setattr(trainer, "score", lambda *_: Score(next(accuracies), 1.0, 10))
    guard = ("--max-accuracy-drop", 5) if guarded else ()
    long = ("--epochs", 5, "--epsilon-warmup", 4, "--final-decay", "none")
    trained = train("--target-parameters", 0.5, *guard, "--model", "cifar:14x4", *long)
    chosen = trained.epochs("epsilon")[4] > 0
    assert chosen is not guarded
    assert ("give a larger --max-accuracy-drop" in trained.result.stderr) is guarded


@pytest.mark.parametrize("options", [("--epsilon", 0), ("--epsilon", 1e-9), ("--nested",)])
def test_a_run_stops_when_validation_gets_no_better(
    train: Train, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...]
) -> None:
    """The second epoch is the best, or where the order of blocks begins to count."""
    scores = iter([0.5, 0.8] + [0.7] * 99)
    monkeypatch.setattr(trainer, "score", lambda *_: Score(next(scores), 1.0, 10))
    long = ("--epochs", 20, "--model", "cifar:14x4", "--early-stopping", 3)
    trained = train(*options, *long)
    assert len(trained.epochs("epoch")) == 5
    told = " ".join(trained.result.stderr.split())
    assert "stopped after epoch 5 of 20: validation has not been better for 3 epochs" in told
    assert "Trained" in told
    again = train(*options, *long, "--resume")
    assert len(again.epochs("epoch")) == 5
    assert "stopped after epoch 5 of 20" in " ".join(again.result.stderr.split())


@pytest.mark.usefixtures("certain_deaths")
def test_a_run_does_not_stop_before_its_target_is_met(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each removal starts the count again."""
    scores = iter(0.9 - 0.01 * epoch for epoch in range(99))
    monkeypatch.setattr(trainer, "score", lambda *_: Score(next(scores), 1.0, 10))
    long = ("--epochs", 16, "--final-decay", "0.5:0.1", "--model", "cifar:14x4")
    trained = train("--target-flops", 0.6, *long, "--early-stopping", 1)
    died = trained.epochs("died")
    assert [bool(blocks) for blocks in died[-2:]] == [True, False]
    assert 2 < len(died) < 16
    assert "cannot be reached" not in trained.result.stderr
    network = trained.best.network.skeleton()
    costed = count_costs(network, (3, 9, 9), "flops")
    assert costed.without(trained.best.dead) <= 0.6 * costed.whole


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_block_dies_after_so_many_closed_epochs(train: Train, closed: str, epochs: int) -> None:
    trained = train("--model", "cifar:14x4", "--epochs", 3, "--patience", epochs)
    assert trained.epochs("died") == [[closed] if epoch == epochs else [] for epoch in (1, 2, 3)]


@pytest.mark.parametrize("option", ["--live-removal", "--no-live-removal"])
def test_a_dead_block_leaves_the_running_network(train: Train, closed: str, option: str) -> None:
    """Where it stays, its weights go on decaying."""
    trained = train("--model", "cifar:14x4", "--epochs", 3, "--keep", 3, option)
    after, later = (
        Checkpoint.load(trained.folder / f"epoch-{epoch:04}.pt").state for epoch in (2, 3)
    )
    weights = [name for name in after if name.startswith(f"{closed}.") and after[name].dim() == 4]
    assert trained.epochs("died")[1] == [closed]
    assert weights
    stays = [not torch.equal(after[name], later[name]) for name in weights]
    assert set(stays) == {option == "--no-live-removal"}
