"""Pruning sweep: remove live blocks step by step, least important first, down to one a stage."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table
from torch import fx, nn

from eps_compact.analysis import importance
from eps_compact.analysis.importance import CPU, Predictions, points, predict, scaled
from eps_compact.certificate import as_json
from eps_core import cli
from eps_core.cli import Log
from eps_core.errors import ConfigError
from eps_core.stats import Interval, median, paired_counts, ratio_of_medians
from eps_train.data.dataset import Data
from eps_train.data.images import ImageSet
from eps_train.gating import rewriting
from eps_train.gating.costs import Timer, branch_costs, measure_latency
from eps_train.gating.nested import reestimate_batchnorm, smallest_size
from eps_train.gating.targets import TARGETS, Currency, Target, cheapness
from eps_train.models.resnets import Normalize
from eps_train.models.spec import cost
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import BATCH

STEPS = 24  # at most, so that deep networks end in a bearable time
BISECTIONS = 3  # networks at most that are tried within a step that passes a goal
STATISTICS = 4096  # training images that a nested run's batch norms are estimated on
KNEE_RULE = (
    "the point furthest above the straight line from the first to the last, accuracy over"
    " parameters, both scaled to 0..1"
)
_UNTIMED = Interval(math.nan, math.nan, math.nan)

Weight = Literal["parameters", "flops", "ms"]

# -- The curve of a sweep


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassLoss:
    """Points of accuracy that a class of `samples` images lost against the first point."""

    name: str
    samples: int
    drop: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One network of the sweep. FLOPs are those of one image; times those of a call with one.

    Attributes:
        removed: blocks removed beyond the dead ones, in order of removal.
        parameters_share, flops_share: of the network as it was built, at full depth (0..1).
        latency_share: median time over that of the network with its dead blocks, as long as the
            checkpoint has their tensors.
        latency_predicted: the same share, from the times of single blocks; None where they were not
            measured.
        accuracy, loss: on the samples that choose no block (0..1; cross-entropy).
        drop: points of accuracy lost against the first point.
        ms, speedup: median time, and the first point's over this one's.
        worst: the class that lost most, by the lower end of its interval, as a class with few
            images loses many points by chance; None where no class lost.
    """

    removed: tuple[str, ...]
    parameters: int
    flops: int
    parameters_share: float
    flops_share: float
    latency_share: Interval = _UNTIMED
    latency_predicted: float | None
    accuracy: float
    loss: float
    drop: Interval
    ms: Interval = _UNTIMED
    speedup: Interval = _UNTIMED
    worst: ClassLoss | None = None

    def share(self, currency: Currency) -> float:
        """Share of the cost; of the latency as predicted, until it is measured."""
        if currency == "parameters":
            return self.parameters_share
        if currency == "flops":
            return self.flops_share
        if math.isnan(self.latency_share.value):
            assert self.latency_predicted is not None
            return self.latency_predicted
        return self.latency_share.value


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Networks from the compact one down to one block a stage.

    Attributes:
        nested: whether the blocks went in the order of a nested training.
        points: the first has lost only the dead blocks, each other at least one block more than the
            one before. A stage keeps its last block.
        knee: index of the point where the curve bends: see `KNEE_RULE`.
        weight: what a rise in loss is divided by when the next block is chosen.
        chosen_on, measured_on: number of samples that choose the blocks, and of those that the
            accuracies are measured on; no image serves both.
        seconds: of all the work, timing included.
    """

    nested: bool
    points: tuple[Point, ...]
    knee: int
    weight: Weight
    chosen_on: int
    measured_on: int
    timer: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**as_json(self), "knee_rule": KNEE_RULE}


def knee(curve: Sequence[tuple[float, float]]) -> int:
    """Return the index of the knee of a curve of (size, accuracy), largest network first.

    See `KNEE_RULE`. Where accuracy does not fall from the first to the last, it is the last; where
    the size does not, the first.
    """
    (largest, best), (smallest, worst) = curve[0], curve[-1]
    if smallest >= largest:
        return 0
    if worst >= best:
        return len(curve) - 1
    heights = [
        (accuracy - worst) / (best - worst) - (size - smallest) / (largest - smallest)
        for size, accuracy in curve
    ]
    return heights.index(max(heights))


# -- The goal: which network of a sweep is wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """The network of a sweep to select.

    With a target, the largest network that is small enough; with a limit to the drop alone, the
    smallest within it. Drops are judged as measured, not by their intervals.

    Attributes:
        target_parameters, target_flops, target_latency: share to keep of the network as it was
            built, 0..1.
        target_speedup: the same as a latency of 1 / `target_speedup`.
        max_accuracy_drop: points of accuracy that may be lost against the first point, 0 to 100.

    Raises:
        ConfigError: nothing is given, or a value is out of range.
    """

    target_parameters: float | None = None
    target_flops: float | None = None
    target_latency: float | None = None
    target_speedup: float | None = None
    max_accuracy_drop: float | None = None

    def __post_init__(self) -> None:
        drop = self.max_accuracy_drop
        if drop is None and not self.targets:
            raise ConfigError(
                "nothing to select by: give --target-parameters, --target-flops, --target-latency,"
                " --target-speedup or --max-accuracy-drop"
            )
        if drop is not None and not 0 <= drop <= 100:
            raise ConfigError(f"--max-accuracy-drop {drop:g}: must be 0 to 100 points")

    @property
    def targets(self) -> list[Target]:
        """The shares to keep, in the order of the options. Raises ConfigError if out of range."""
        values = {name: getattr(self, name) for name in TARGETS}
        return [Target.of(name, value) for name, value in values.items() if value is not None]

    @property
    def by_latency(self) -> bool:
        return any(target.currency == "latency" for target in self.targets)

    @property
    def weight(self) -> Weight:
        """What a block saves, for the choice of the next: the currency of the first target."""
        first = self.targets[0].currency if self.targets else "parameters"
        return "ms" if first == "latency" else first

    def small_enough(self, point: Point) -> bool:
        return all(point.share(target.currency) <= target.share for target in self.targets)

    def find(self, curve: Sequence[Point]) -> int | None:
        """Return the index of the network to select; a curve goes from largest to smallest."""
        # Rounding must not fail a drop of exactly the limit.
        limit = math.inf if self.max_accuracy_drop is None else self.max_accuracy_drop + 1e-9
        fitting = [
            index
            for index, point in enumerate(curve)
            if self.small_enough(point) and point.drop.value <= limit
        ]
        if not fitting:
            return None
        return fitting[0] if self.targets else fitting[-1]

    def overshoot(self, curve: Sequence[Point]) -> int | None:
        """Return the index after the step that passes the goal; a network within it may be nearer.

        None where the curve begins or ends before the goal.
        """
        index = self.find(curve)
        if index is None and self.targets:
            index = next((i for i, point in enumerate(curve) if self.small_enough(point)), None)
        elif index is not None and not self.targets:
            index += 1
        return index if index is not None and 0 < index < len(curve) else None

    def describe(self, point: Point) -> str:
        """Return one line: what was asked for, and what was selected."""
        asked = [str(target) for target in self.targets]
        if self.max_accuracy_drop is not None:
            asked.append(f"--max-accuracy-drop {self.max_accuracy_drop:g}")
        count = len(point.removed)
        latency = ""
        if self.by_latency:
            latency = (
                f", {point.latency_share.value:.1%} of the latency measured"
                f" ({point.latency_predicted:.1%} predicted)"
            )
        return (
            f"asked for {', '.join(asked)}; found {point.parameters_share:.1%} of the parameters"
            f" and {point.flops_share:.1%} of the FLOPs{latency}, {point.drop.value:+.1f} points"
            f" lost, {count} live block{'' if count == 1 else 's'} removed"
        )


def pick(found: Sweep, goal: Goal) -> Point:
    """Return the point that meets all of `goal`. Raises ConfigError when no point does."""
    index = goal.find(found.points)
    if index is not None:
        return found.points[index]
    fitting = [point for point in found.points if goal.small_enough(point)]
    if fitting:
        best = min(fitting, key=lambda point: point.drop.value)
        raise ConfigError(
            f"--max-accuracy-drop {goal.max_accuracy_drop:g}: no network of the sweep that is small"
            f" enough keeps it; the least drop among them is {best.drop.value:.2f} points, at"
            f" {best.parameters_share:.1%} of the parameters; allow that, or ask for a larger share"
        )
    smallest = found.points[-1]
    target = next(t for t in goal.targets if t.share < smallest.share(t.currency))
    reached = smallest.share(target.currency)
    remedy = f"ask for at least {math.ceil(1000 * reached) / 1000:g}"
    if goal.target_speedup is not None and target.currency == "latency":
        remedy = f"ask for at most {math.floor(1000 / reached) / 1000:g}"
    raise ConfigError(
        f"{target}: the smallest network of the sweep keeps {reached:.1%} of the"
        f" {target.unit}, as every stage keeps a block; {remedy}"
    )


# -- The sweep


def sweep(
    checkpoint: Checkpoint,
    data: Data,
    goal: Goal | None = None,
    *,
    samples: int,
    timer: Timer,
    device: torch.device = CPU,
    report: Log = lambda line: None,
) -> Sweep:
    """Remove live blocks one at a time, each time the one that costs least for what it saves.

    The cost is the rise of the cross-entropy without the block, divided by what it saves of the
    goal's first target, or of the parameters; of those whose loss does not rise, the one that saves
    most goes first. One half of the samples chooses the blocks, the other measures the accuracies.
    Blocks of a nested run go in the order of its training, and all samples measure the accuracies,
    each network's with batch-norm statistics of its own.

    A network with more than `STEPS` blocks to remove loses several in one step; the step that
    passes `goal` is then bisected: towards a latency first by the times of single blocks, then by
    the times of the networks. A stage keeps its last block, as in training
    (`rewriting.removable`).

    Args:
        checkpoint: gated, or plain: then all of its residual blocks take part.
        data: what it was trained on.
        goal: the network wanted; None: only the curve is.
        samples: images of the validation part, 2 or more; see `importance.evaluation_samples`.

    Raises:
        ConfigError: no block is left to remove, or there are too few images.
        FileFormatError: the checkpoint's tensors are not those of its network.
        GraphError: `timer` cannot run the network.
    """
    began = time.perf_counter()
    found = _Descent(checkpoint, data, goal, samples, timer, device, report)
    found.remove_blocks()
    found.bisect()
    report(f"sweep: timing {len(found.points)} networks")
    found.points = found.timed(found.points)
    if goal is not None and goal.by_latency:  # times that were predicted are measured now
        found.bisect(timed=True)
    return Sweep(
        nested=bool(found.order),
        points=tuple(found.points),
        knee=knee([(each.parameters, each.accuracy) for each in found.points]),
        weight=found.weight,
        chosen_on=0 if found.order else len(found.choosing),
        measured_on=len(found.measuring),
        timer=timer.name,
        seconds=time.perf_counter() - began,
    )


class _Descent:
    """The network that a sweep makes shallower, and its points, from the whole to the smallest.

    Attributes:
        order: of a nested run, from the last block to go to the first; else empty.
        removable: how many blocks can go.
        choosing, measuring: images that choose the blocks, and that measure accuracies.
        statistics: training images for the batch norms of a nested run's networks; else None.
        full: cost of the network as it was built.
        measure: times the network as it was built, dead blocks included, without some blocks.
        latency: its latency and that of each block; None unless the goal is one of latency.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: Data,
        goal: Goal | None,
        samples: int,
        timer: Timer,
        device: torch.device,
        report: Log,
    ) -> None:
        self.goal, self.report = goal, report
        self.weight: Weight = "parameters" if goal is None else goal.weight
        self.order = checkpoint.order
        self.model = importance.live_network(checkpoint)
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.normalize = Normalize.of(checkpoint.data).to(device)
        self.shape, self.classes = checkpoint.data.input_shape, checkpoint.data.classes
        self.full = cost(checkpoint.network.skeleton(), self.shape)
        self.costs = branch_costs(self.model, self.shape)
        self.stages = rewriting.stages(self.model, self.shape)
        blocks = [found.block for found in self.costs]
        self.removable = len(rewriting.removable(blocks, blocks, self.stages))
        if self.order:
            self.removable = len(self.order) - smallest_size(self.stages)
        if not blocks:
            raise ConfigError("every block is dead: there is none left for a sweep to remove")
        if not self.removable:
            why = "every block that is left is the last of its stage"
            raise ConfigError(f"{why}: there is none for a sweep to remove")
        images = importance.evaluation_samples(data.validation, samples, device)
        half = len(images) // 2
        if not half:
            raise ConfigError(f"a sweep needs at least 2 held-out images, not {len(images)}")
        self.choosing = images[torch.arange(half)]
        self.measuring = images if self.order else images[torch.arange(half, len(images))]
        self.statistics: ImageSet | None = None
        if self.order:
            self.statistics = importance.evaluation_samples(data.train, STATISTICS, device)

        report(f"sweep: preparing to time the networks ({timer.name})")
        image = self.measuring.images[:1]
        built = importance.live_network(checkpoint, dead=True).to(device)
        self.dead = tuple(block for block in rewriting.gates(built) if block not in blocks)
        self.measure = timer.load(built, image)
        by_block = goal is not None and goal.by_latency
        self.latency = measure_latency(built, image, timer, self.measure) if by_block else None
        self.first = predict(self.model, self.normalize, self.measuring)
        self.points: list[Point] = []
        measured = f"{len(self.measuring):,}"
        report(
            f"sweep: {len(blocks)} blocks, chosen on {half:,} held-out images, accuracy measured on"
            f" {measured} others"
            if self.statistics is None
            else f"sweep: {len(blocks)} blocks in the order of the nested training, statistics of"
            f" {len(self.statistics):,} training images, accuracy on {measured} held-out images"
        )

    def remove_blocks(self) -> None:
        """Add a point for each step, until no block can go."""
        network, removed = self.model, tuple[str, ...]()
        self.points.append(self._point(network, removed))
        at_once = math.ceil(self.removable / STEPS)
        while len(removed) < self.removable:
            if self.order:
                removed = self.order[::-1][: min(len(removed) + at_once, self.removable)]
            else:
                removed = (*removed, *self._cheapest(network)[:at_once])
            network = self._without(removed)
            self.points.append(self._point(network, removed))

    def _cheapest(self, network: fx.GraphModule) -> list[str]:
        """Return the blocks that may go one after another, the cheapest to lose first."""
        if self.weight == "ms":
            assert self.latency is not None
            saved = self.latency.blocks
        else:
            saved = {found.block: getattr(found, self.weight) for found in self.costs}
        predictions = importance.leave_one_out(network, self.normalize, self.choosing)
        loss = predictions.pop(None).mean_loss
        rises = {block: said.mean_loss - loss for block, said in predictions.items() if block}
        ranked = sorted(rises, key=lambda block: cheapness(rises[block], saved[block]))
        return rewriting.removable(ranked, rises, self.stages)

    def bisect(self, *, timed: bool = False) -> None:
        """Try networks within the step that passes the goal; with `timed`, time them."""
        for _ in range(BISECTIONS):
            index = self.goal.overshoot(self.points) if self.goal else None
            if index is None:
                return
            before, after = self.points[index - 1].removed, self.points[index].removed
            if len(after) - len(before) == 1:
                return
            removed = after[: (len(before) + len(after)) // 2]
            new = self._point(self._without(removed), removed)
            if timed:
                new = self.timed([self.points[0], new])[1]
            self.points.insert(index, new)

    def timed(self, points: Sequence[Point]) -> list[Point]:
        """Time networks beside the network as it was built and the first of them."""
        removed = [(*self.dead, *each.removed) for each in points]
        distinct = list(dict.fromkeys([(), *removed]))
        runs = dict(zip(distinct, self.measure(distinct), strict=True))
        first = runs[removed[0]]
        return [
            replace(
                each,
                ms=median(runs[key]),
                speedup=ratio_of_medians(first, runs[key]),
                latency_share=ratio_of_medians(runs[key], runs[()]),
            )
            for each, key in zip(points, removed, strict=True)
        ]

    def _without(self, removed: Collection[str]) -> fx.GraphModule:
        if self.statistics is not None and removed:
            return nested_network(self.model, self.normalize, removed, self.statistics)
        return rewriting.remove_blocks(self.model, removed)

    def _point(self, network: fx.GraphModule, removed: tuple[str, ...]) -> Point:
        found = predict(network, self.normalize, self.measuring) if removed else self.first
        labels = self.measuring.labels.cpu().numpy()
        size, predicted = cost(network, self.shape), None
        if self.latency is not None:
            predicted = self.latency.without((*self.dead, *removed)) / self.latency.whole
        self.report(
            f"sweep: {len(removed)} of {self.removable} blocks removed: accuracy"
            f" {found.accuracy:.2%}, loss {found.mean_loss:.3f}"
        )
        return Point(
            removed=removed,
            parameters=size.parameters,
            flops=size.flops,
            parameters_share=size.parameters / self.full.parameters,
            flops_share=size.flops / self.full.flops,
            latency_predicted=predicted,
            accuracy=found.accuracy,
            loss=found.mean_loss,
            drop=importance.accuracy_drop(self.first, found),
            worst=worst_class(self.first, found, labels, self.classes),
        )


def nested_network(
    model: fx.GraphModule, normalize: nn.Module, removed: Collection[str], images: ImageSet
) -> fx.GraphModule:
    """Return a copy of a nested run's gated `model` without some blocks.

    Its batch norms are estimated again on `images`, training images on the network's device.
    """
    network = copy.deepcopy(rewriting.remove_blocks(model, removed))
    size = min(BATCH, len(images))
    full = len(images) - len(images) % size
    batches = images.images[:full].split(size)
    reestimate_batchnorm(network, (normalize(batch) for batch in batches))
    return network


def worst_class(
    before: Predictions, after: Predictions, labels: npt.NDArray[np.int64], names: Sequence[str]
) -> ClassLoss | None:
    """Return the class that lost most accuracy, on the same images; None if none lost any."""
    counts = paired_counts(before.correct, after.correct, labels, len(names))
    losses = [
        ClassLoss(name=name, samples=total, drop=importance.points_lost(lost, won, total))
        for name, (lost, won, total) in zip(names, counts, strict=True)
        if lost > won
    ]
    return max(losses, key=lambda loss: loss.drop.low, default=None)


# -- Tables


def table(found: Sweep) -> Table:
    """Return a table with one row a point, the knee marked."""
    chosen = f"chosen by loss per {found.weight} on {found.chosen_on:,} held-out images"
    others = " others"
    if found.nested:
        chosen, others = "in the order of the nested training", ""
    costs = ("parameters", "", "FLOPs", "", "ms", "", "faster")
    rows = []
    before = 0
    for index, point in enumerate(found.points):
        gone = point.removed[before:]
        before = len(point.removed)
        name = f"{before}: {gone[0]}" if gone else "dead blocks only"
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        rows.append(
            (
                f"{name}{more}{' ◄ knee' if index == found.knee else ''}",
                f"{point.parameters:,}",
                f"{point.parameters_share:.1%}",
                scaled(point.flops),
                f"{point.flops_share:.1%}",
                f"{point.ms.value:.3f}",
                f"{point.latency_share.value:.1%}",
                f"{point.speedup.value:.2f}x",
                f"{point.accuracy:.2%}",
                points(point.drop),
            )
        )
    title = f"Sweep: {chosen}, accuracy on {found.measured_on:,}{others}; times: {found.timer}"
    return cli.table(title, ("removed", *costs, "accuracy", "points lost"), rows)


def class_table(found: Sweep) -> Table:
    """Return a table of the class that lost most at each point after the first."""
    rows = [
        (f"{len(point.removed)}", worst.name, f"{worst.samples:,}", points(worst.drop))
        if (worst := point.worst)
        else (f"{len(point.removed)}", "none", "", "")
        for point in found.points[1:]
    ]
    title = "Sweep: the class that lost most"
    return cli.table(title, ("removed", "class", "its images", "points lost"), rows)
