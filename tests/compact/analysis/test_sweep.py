"""The sweep: what is removed first, in how many steps, and that no image is used twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from eps_compact.analysis import sweep as module
from eps_compact.analysis.importance import Predictions, evaluation_samples, predict
from eps_compact.analysis.sweep import BISECTIONS, Goal, pick, sweep, worst_class
from eps_compact.compaction import compact
from eps_core.errors import ConfigError
from eps_core.timing import Runs
from eps_train.data import dataset
from eps_train.data.images import ImageSet
from eps_train.gating import rewriting
from eps_train.gating.costs import Measure
from eps_train.gating.rewriting import branch_parameters
from eps_train.gating.targets import cheapness
from eps_train.models.resnets import Normalize
from eps_train.models.spec import cost
from tests.checkpoints import make_checkpoint
from tests.train.gating.timers import LayerTimer

DEAD = ("stages.1.1",)
DIGITS = dataset.load("digits")


def test_every_point_is_the_network_without_its_blocks() -> None:
    checkpoint = make_checkpoint(dead=DEAD)
    found = sweep(checkpoint, DIGITS, timer=LayerTimer(), samples=143)
    live = [block for block in checkpoint.network.gated if block not in DEAD]
    assert len(found.points) == 1 + len(live) - 3
    left = set(live).difference(found.points[-1].removed)
    assert sorted(map(rewriting.stage_name, left)) == ["stages.0", "stages.1", "stages.2"]
    assert found.chosen_on + found.measured_on == len(DIGITS.validation)
    assert 0 < found.chosen_on < found.measured_on
    gated = checkpoint.build_gated().eval()
    shape = checkpoint.data.input_shape
    whole = cost(gated, shape)
    normalize = Normalize.of(checkpoint.data)
    samples = evaluation_samples(DIGITS.validation, 143)
    others = samples[torch.arange(found.chosen_on, 143)]
    for before, point in zip((None, *found.points), found.points, strict=False):
        assert before is None or point.removed[:-1] == before.removed
        network = compact(gated, dead=point.removed)
        size = cost(network, shape)
        assert (point.parameters, point.flops) == (size.parameters, size.flops)
        assert point.parameters_share == size.parameters / whole.parameters
        alone = predict(network, normalize, others)
        assert point.accuracy == pytest.approx(alone.accuracy)
        assert point.loss == pytest.approx(alone.mean_loss, rel=1e-4)
        assert point.drop.value == pytest.approx(100 * (found.points[0].accuracy - point.accuracy))
    assert found.points[0].speedup.value == 1
    assert found.points[0].parameters_share < 1, "the dead block is out already"
    assert [p.ms.value for p in found.points] == sorted(
        (p.ms.value for p in found.points), reverse=True
    )


def test_every_point_names_the_class_that_lost_most() -> None:
    """Counted image by image; by the lower end of the interval, not by the measured drop."""
    checkpoint = make_checkpoint(dead=DEAD)
    found = sweep(checkpoint, DIGITS, timer=LayerTimer(), samples=143)
    samples = evaluation_samples(DIGITS.validation, 143)
    others = samples[torch.arange(found.chosen_on, 143)]
    gated = checkpoint.build_gated().eval()
    normalize = Normalize.of(checkpoint.data)

    def right(removed: tuple[str, ...]) -> list[bool]:
        network = compact(gated, dead=[*DEAD, *removed])
        found: list[bool] = predict(network, normalize, others).correct.tolist()
        return found

    first = right(())
    named = 0
    for point in found.points:
        lost: Counter[int] = Counter()
        for label, was, now in zip(
            others.labels.tolist(), first, right(point.removed), strict=True
        ):
            lost[label] += was - now
        if point.worst is None:
            assert max(lost.values()) <= 0
            continue
        named += 1
        label = checkpoint.data.classes.index(point.worst.name)
        assert point.worst.samples == others.labels.tolist().count(label)
        assert lost[label] > 0
        assert point.worst.drop.value == pytest.approx(100 * lost[label] / point.worst.samples)
        assert point.worst.drop.low < point.worst.drop.value <= point.worst.drop.high
    assert found.points[0].worst is None
    assert named


def test_a_class_of_one_image_is_not_the_one_that_lost_most() -> None:
    before, after = Predictions(), Predictions()
    labels = torch.tensor([0] * 40 + [1])
    wrong = torch.tensor([1] * 20 + [0] * 20 + [0])
    before.add(F.one_hot(labels, 3).float(), labels)
    after.add(F.one_hot(wrong, 3).float(), labels)
    names = ("many", "one", "without images")
    worst = worst_class(before, after, labels.numpy(), names)
    assert worst is not None
    assert (worst.name, worst.samples, worst.drop.value) == ("many", 40, 50)
    assert worst_class(before, before, labels.numpy(), names) is None


def test_the_first_to_go_costs_least_loss_for_what_it_saves() -> None:
    checkpoint = make_checkpoint(depth=14)
    found = sweep(checkpoint, DIGITS, timer=LayerTimer(), samples=143)
    gated = checkpoint.build_gated().eval()
    normalize = Normalize.of(checkpoint.data)
    choosing = evaluation_samples(DIGITS.validation, found.chosen_on)
    whole = predict(compact(gated), normalize, choosing).mean_loss
    rises = {
        block: predict(compact(gated, dead=[block]), normalize, choosing).mean_loss - whole
        for block in checkpoint.network.gated
    }
    saved = branch_parameters(gated)
    best = min(rises, key=lambda block: cheapness(rises[block], saved[block]))
    assert found.points[1].removed == (best,)


@pytest.mark.parametrize(
    ("goal", "weight"),
    [
        (None, "parameters"),
        (Goal(max_accuracy_drop=1.0), "parameters"),
        (Goal(target_flops=0.7, target_latency=0.7), "flops"),
        (Goal(target_speedup=1.2), "ms"),
    ],
)
def test_it_is_weighed_by_the_first_target(goal: Goal | None, weight: str) -> None:
    found = sweep(make_checkpoint(depth=14), DIGITS, goal=goal, timer=LayerTimer(), samples=143)
    assert found.weight == weight
    assert len(found.points) == 4


def test_of_many_blocks_several_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 5)
    found = sweep(make_checkpoint(depth=32), DIGITS, timer=LayerTimer(), samples=40)
    assert [len(point.removed) for point in found.points] == [0, 3, 6, 9, 12]
    assert (found.chosen_on, found.measured_on) == (20, 20)


@pytest.mark.parametrize(
    "goal",
    [
        Goal(target_flops=0.5),
        Goal(target_latency=0.5),
        Goal(target_parameters=0.5, max_accuracy_drop=100),
    ],
    ids=["flops", "latency", "parameters and drop"],
)
def test_the_step_that_passes_the_goal_is_bisected(
    goal: Goal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six blocks go at once: what is selected must be within a block of what was asked for."""
    monkeypatch.setattr(module, "STEPS", 2)
    checkpoint = make_checkpoint(depth=32)
    swept = sweep(checkpoint, DIGITS, goal=goal, timer=LayerTimer(), samples=143)
    point = pick(swept, goal)
    counts = [len(found.removed) for found in swept.points]
    assert counts == sorted(counts)
    assert {0, 6, 12} <= set(counts)
    assert len(counts) <= 3 + BISECTIONS
    before = swept.points[swept.points.index(point) - 1]
    assert len(before.removed) == len(point.removed) - 1
    assert not goal.small_enough(before)
    plain = compact(checkpoint.build_gated().eval(), dead=point.removed)
    assert point.flops == cost(plain, checkpoint.data.input_shape).flops


def test_the_last_block_of_a_stage_stays() -> None:
    """Dead blocks left one in the first stage, and none in the second."""
    dead = ("stages.0.0", "stages.0.2", *(f"stages.1.{block}" for block in range(3)))
    found = sweep(make_checkpoint(dead=dead), DIGITS, timer=LayerTimer(), samples=143)
    assert len(found.points[-1].removed) == 2
    assert {rewriting.stage_name(block) for block in found.points[-1].removed} == {"stages.2"}


def test_each_network_is_timed_beside_the_first() -> None:
    timer = LayerTimer()
    found = sweep(make_checkpoint(), DIGITS, timer=timer, samples=143)
    (without,) = timer.calls
    assert without == [point.removed for point in found.points]
    assert [p.speedup.value for p in found.points] == [
        found.points[0].ms.value / p.ms.value for p in found.points
    ]


def test_latency_is_a_share_of_the_network_with_its_dead_blocks() -> None:
    checkpoint = make_checkpoint(dead=DEAD)
    timer = LayerTimer()
    goal = Goal(target_latency=0.6)
    found = sweep(checkpoint, DIGITS, goal=goal, timer=timer, samples=20)
    whole = 1 + 6 * 2.0 + 3 * 4.0  # `LayerTimer`: the stem, and the blocks of three stages
    assert found.points[0].latency_share.value == pytest.approx((whole - 2) / whole)
    for point in found.points:
        saved = sum(
            4.0 if block.startswith("stages.2") else 2.0 for block in (*DEAD, *point.removed)
        )
        assert point.latency_share.value == pytest.approx((whole - saved) / whole)
        assert point.latency_predicted == pytest.approx((whole - saved) / whole)
    point = pick(found, goal)
    before = found.points[found.points.index(point) - 1]
    assert point.latency_share.value <= 0.6 < before.latency_share.value


def test_a_nested_run_is_cut_by_latency_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve blocks go at once; the cut is within a block of what was asked for."""
    monkeypatch.setattr(module, "STEPS", 1)
    monkeypatch.setattr(module, "STATISTICS", 64)
    checkpoint = make_checkpoint(depth=32)
    blocks = checkpoint.network.gated
    first = [block for block in blocks if block.endswith(".0")]
    checkpoint.order = (*first, *(block for block in blocks if block not in first))
    goal = Goal(target_speedup=1.3)
    found = sweep(
        checkpoint,
        DIGITS,
        goal=goal,
        timer=LayerTimer(),
        samples=20,
    )
    point = pick(found, goal)
    assert found.nested
    assert point.removed == checkpoint.order[::-1][: len(point.removed)]
    before = found.points[found.points.index(point) - 1]
    assert len(before.removed) == len(point.removed) - 1
    assert point.latency_share.value <= 1 / 1.3 < before.latency_share.value
    assert point.latency_predicted == pytest.approx(point.latency_share.value)


def test_a_prediction_that_is_wrong_is_corrected_by_the_times_of_the_networks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks seem to save a third of what they do when they are timed alone."""

    class Optimistic(LayerTimer):
        def load(self, model: fx.GraphModule, image: Tensor) -> Measure:
            measure = super().load(model, image)
            whole = measure([()])[0]

            def slower(without: Sequence[Collection[str]]) -> list[Runs]:
                times = measure(without)
                early = len(self.calls) <= 3
                return [whole - (whole - runs) / 3 for runs in times] if early else times

            return slower

    monkeypatch.setattr(module, "STEPS", 2)
    goal, checkpoint = Goal(target_latency=0.7), make_checkpoint(depth=32)
    found = sweep(checkpoint, DIGITS, goal=goal, timer=Optimistic(), samples=20)
    point = pick(found, goal)
    before = found.points[found.points.index(point) - 1]
    assert len(before.removed) == len(point.removed) - 1
    assert point.latency_share.value <= 0.7 < before.latency_share.value
    assert point.latency_predicted is not None
    assert point.latency_predicted > 0.7


def test_a_single_image_is_refused() -> None:
    one = replace(DIGITS, validation=DIGITS.validation[torch.arange(1)])
    with pytest.raises(ConfigError, match=r"^a sweep needs at least 2 held-out images, not 1$"):
        sweep(make_checkpoint(), one, timer=LayerTimer(), samples=143)


def test_nothing_left_to_remove_is_refused() -> None:
    every = make_checkpoint().network.gated
    with pytest.raises(ConfigError, match="every block is dead"):
        sweep(make_checkpoint(dead=every), DIGITS, timer=LayerTimer(), samples=9)
    with pytest.raises(ConfigError, match="every block that is left is the last of its stage"):
        sweep(make_checkpoint(depth=8), DIGITS, timer=LayerTimer(), samples=9)


def test_images_on_disk_serve_as_well() -> None:
    """A part that is read as it goes gives the same answers as one that is held."""

    class OnDisk:
        def __init__(self, held: ImageSet) -> None:
            self.held = held

        def __len__(self) -> int:
            return len(self.held)

        def __getitem__(self, index: Tensor) -> OnDisk:
            return OnDisk(self.held[index])

        @property
        def images(self) -> Tensor:
            return self.held.images.clone()

        @property
        def labels(self) -> Tensor:
            return self.held.labels

    held = DIGITS.validation
    assert isinstance(held, ImageSet)
    checkpoint = make_checkpoint(depth=14)
    on_disk = replace(DIGITS, validation=OnDisk(held))  # type: ignore[arg-type]
    first = sweep(checkpoint, on_disk, timer=LayerTimer(), samples=143)
    second = sweep(checkpoint, DIGITS, timer=LayerTimer(), samples=143)
    assert first.points == second.points
