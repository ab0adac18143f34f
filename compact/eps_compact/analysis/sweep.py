"""Pruning sweep: remove live blocks step by step, least important first, down to one a stage."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from eps_compact.analysis.importance import (
    CPU,
    Predictions,
    accuracy_drop,
    evaluation_samples,
    leave_one_out,
    live_network,
    points,
    predict,
    scaled,
)
from eps_core import cli
from eps_core.cli import Log
from eps_core.errors import ConfigError
from eps_core.stats import (
    Interval,
    median,
    paired_counts,
    paired_difference,
    ratio_of_medians,
)
from eps_train.data.dataset import Data
from eps_train.data.images import ImageSet, Part
from eps_train.gating import rewriting
from eps_train.gating.costs import (
    Timer,
    TorchTimer,
    branch_costs,
    measure_latency,
)
from eps_train.gating.nested import reestimate_batchnorm, smallest_size
from eps_train.gating.targets import TARGETS, Currency, Target, cheapness
from eps_train.models.cifar import Normalize
from eps_train.models.spec import cost
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import BATCH, score

if TYPE_CHECKING:
    from rich.table import Table

# -- The networks of a sweep, the knee of their curve, and the one that meets a goal

KNEE_RULE = (
    "the point furthest above the straight line from the first to the last, accuracy over"
    " parameters, both scaled to 0..1"
)

Weight = Literal["parameters", "flops", "ms"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassLoss:
    """What one class lost.

    Attributes:
        name: of the class.
        samples: its images.
        drop: points of accuracy lost against the first point, with Tango's 95 % interval.
    """

    name: str
    samples: int
    drop: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One network of the sweep.

    Attributes:
        removed: blocks removed beyond the dead ones, in order of removal.
        parameters, flops: of the network; FLOPs of one image.
        parameters_share, flops_share: of the network as it was built, at full depth (0..1).
        latency_share: median time over that of the network with its dead blocks, as long as the
            checkpoint has their tensors; with its 95 % interval.
        latency_predicted: the same share, from the times of single blocks; None where they were not
            measured.
        accuracy, loss: on the samples that choose no block (0..1; cross-entropy).
        drop: points of accuracy lost against the first point, with Tango's 95 % interval.
        ms: median time of a call with one image, with its 95 % interval.
        speedup: the first point's median time over this one's, with its 95 % interval.
        worst: the class that lost most, by the lower end of its interval, as a class with few
            images loses many points by chance; None where no class lost.
    """

    removed: tuple[str, ...]
    parameters: int
    flops: int
    parameters_share: float
    flops_share: float
    latency_share: Interval
    latency_predicted: float | None
    accuracy: float
    loss: float
    drop: Interval
    ms: Interval
    speedup: Interval
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
        chosen_on, measured_on: samples that choose the blocks, and samples that the accuracies are
            measured on; no image serves both.
        timer: name of the timer.
        seconds: of all the work, once the timer was ready.
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
        """Return it as JSON holds it."""
        return {**msgspec.json.decode(msgspec.json.encode(self)), "knee_rule": KNEE_RULE}


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """The network of a sweep to select.

    With a target, the largest network that is small enough; with a limit to the drop alone, the
    smallest within it. Drops are judged as measured, not by their intervals.

    Attributes:
        target_parameters, target_flops, target_latency: share to keep of the network as it was
            built, 0..1.
        target_speedup: the same as a latency of 1 / `target_speedup`.
        max_accuracy_drop: points of accuracy that may be lost against the first point.

    Raises:
        ConfigError: nothing is given, or a value is out of range.
    """

    target_parameters: float | None = None
    target_flops: float | None = None
    target_latency: float | None = None
    target_speedup: float | None = None
    max_accuracy_drop: float | None = None

    def __post_init__(self) -> None:
        if self.max_accuracy_drop is None and not self.targets:
            raise ConfigError(
                "nothing to select by: give --target-parameters, --target-flops, --target-latency,"
                " --target-speedup or --max-accuracy-drop"
            )
        drop = self.max_accuracy_drop
        if drop is not None and not 0 <= drop <= 100:
            raise ConfigError(f"--max-accuracy-drop {drop:g}: must be 0 to 100 points")

    @property
    def targets(self) -> list[Target]:
        """The shares to keep, in the order of the options."""
        found = []
        for name in TARGETS:
            value: float | None = getattr(self, name)
            if value is not None:
                found.append(Target.of(name, value))
        return found

    @property
    def by_latency(self) -> bool:
        """Whether a share of the latency is asked for."""
        return any(target.currency == "latency" for target in self.targets)

    def small_enough(self, point: Point) -> bool:
        return all(point.share(target.currency) <= target.share for target in self.targets)

    def accurate_enough(self, point: Point) -> bool:
        # Rounding must not fail a drop of exactly the limit.
        limit = self.max_accuracy_drop
        return limit is None or point.drop.value <= limit + 1e-9

    def find(self, curve: Sequence[Point]) -> int | None:
        """Return the index of the network to select; a curve goes from largest to smallest."""
        fitting = [
            index
            for index, point in enumerate(curve)
            if self.small_enough(point) and self.accurate_enough(point)
        ]
        if not fitting:
            return None
        return fitting[0] if self.targets else fitting[-1]

    def overshoot(self, curve: Sequence[Point]) -> int | None:
        """Return the index after the step that passes the goal; a network within it may be nearer.

        None where the curve begins or ends before the goal.
        """
        index = self.find(curve)
        if not self.targets:
            index = None if index is None else index + 1
        elif index is None:
            small = (index for index, point in enumerate(curve) if self.small_enough(point))
            index = next(small, None)
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


def table(found: Sweep) -> Table:
    """Return a table with one row a point, the knee marked."""
    chosen = f"chosen by loss per {found.weight} on {found.chosen_on:,} held-out images"
    if found.nested:
        chosen = "in the order of the nested training"
    title = (
        f"Sweep: {chosen}, accuracy on {found.measured_on:,}{'' if found.nested else ' others'};"
        f" times: {found.timer}"
    )
    columns = (
        *("removed", "parameters", "", "FLOPs", "", "ms", ""),
        *("faster", "accuracy", "points lost"),
    )
    rows = []
    before = 0
    for index, point in enumerate(found.points):
        gone = point.removed[before:]
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        before = len(point.removed)
        rows.append(
            (
                (f"{before}: {gone[0]}{more}" if gone else "dead blocks only")
                + (" ◄ knee" if index == found.knee else ""),
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
    return cli.table(title, columns, rows)


def class_table(found: Sweep) -> Table:
    """Return a table of the class that lost most at each point after the first."""
    rows = [
        (
            f"{len(point.removed)}",
            point.worst.name if point.worst else "none",
            f"{point.worst.samples:,}" if point.worst else "",
            points(point.worst.drop) if point.worst else "",
        )
        for point in found.points[1:]
    ]
    title = "Sweep: the class that lost most"
    return cli.table(title, ("removed", "class", "its images", "points lost"), rows)


# -- The sweep itself

STEPS = 24  # at most, so that deep networks end in a bearable time
BISECTIONS = 3  # networks at most that are tried within a step that passes a goal
_UNTIMED = Interval(math.nan, math.nan, math.nan)


def sweep(
    checkpoint: Checkpoint,
    validation: Part,
    *,
    samples: int,
    train: Part | None = None,
    goal: Goal | None = None,
    weight: Weight = "parameters",
    device: torch.device = CPU,
    timer: Timer | None = None,
    report: Log = lambda line: None,
) -> Sweep:
    """Remove the live blocks of a checkpoint's network one after another.

    Blocks of a nested run go in the order of its training, and all samples measure the accuracies,
    each network's with batch-norm statistics of its own (:func:`nested_network`). Otherwise:
    At each step every remaining block is left out in turn. The next to go is the one with the least
    rise in cross-entropy for what its removal saves; of those whose loss does not rise, the one
    that saves most. Half of the samples choose the blocks, the other half measure the accuracies.
    A network with more than `STEPS` blocks to remove loses several in one step; the step that
    passes `goal` is then bisected: towards a latency first by the times of single blocks, then by
    the times of the networks. A stage keeps its last block, as in training
    (`rewriting.removable`).

    Args:
        checkpoint: gated, or plain: then all of its residual blocks take part.
        validation: its validation part.
        samples: images of it to use, 2 or more; see `importance.evaluation_samples`.
        train: the training part; a nested run needs it.
        goal: the network wanted; None: only the curve is.
        weight: what a block saves: `parameters`, `flops`, or `ms`.
        device: where to compute.
        timer: measures the times; a `TorchTimer` by default.
        report: receives progress, a line at a time.

    Raises:
        ConfigError: no block is left to remove, or there are too few images.
        FileFormatError: the checkpoint's tensors are not those of its network.
        GraphError: `timer` cannot run the network.
    """
    timer = timer or TorchTimer(checkpoint.data)
    model = live_network(checkpoint)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalize = Normalize.of(checkpoint.data).to(device)
    shape = checkpoint.data.input_shape
    costs, stages = branch_costs(model, shape), rewriting.stages(model, shape)
    blocks = [found.block for found in costs]
    nested = checkpoint.order
    removable = len(rewriting.removable(blocks, blocks, stages))
    if nested:
        removable = len(nested) - smallest_size(stages)
    if not blocks:
        raise ConfigError("every block is dead: there is none left for a sweep to remove")
    if not removable:
        raise ConfigError(
            "every block that is left is the last of its stage: there is none for a sweep to remove"
        )
    images = evaluation_samples(validation, samples, device)
    half = len(images) // 2
    if not half:
        raise ConfigError(f"a sweep needs at least 2 held-out images, not {len(images)}")
    choosing, measuring = images[torch.arange(half)], images[torch.arange(half, len(images))]
    if nested:
        measuring = images
        assert train is not None
        statistics = evaluation_samples(train, STATISTICS, device)

    def without(removed: Collection[str]) -> fx.GraphModule:
        if nested and removed:
            return nested_network(model, normalize, removed, statistics)
        return rewriting.remove_blocks(model, removed)

    report(f"sweep: preparing to time the networks ({timer.name})")
    built = live_network(checkpoint, dead=True).to(device)
    dead = tuple(block for block in rewriting.gates(built) if block not in blocks)
    measure = timer.load(built, images.images[:1])
    began = time.perf_counter()
    latency = None
    if weight == "ms" or (goal is not None and goal.by_latency):
        latency = measure_latency(built, images.images[:1], timer, measure)
    saved: Mapping[str, float] = {}
    if weight != "ms":
        saved = {found.block: getattr(found, weight) for found in costs}
    elif latency is not None:
        saved = latency.blocks
    whole = cost(checkpoint.network.skeleton(), shape)
    first, labels = predict(model, normalize, measuring), measuring.labels.cpu().numpy()

    def point(network: fx.GraphModule, removed: tuple[str, ...], found: Predictions) -> Point:
        size = cost(network, shape)
        report(
            f"sweep: {len(removed)} of {removable} blocks removed: accuracy {found.accuracy:.2%},"
            f" loss {found.mean_loss:.3f}"
        )
        return Point(
            removed=removed,
            parameters=size.parameters,
            flops=size.flops,
            parameters_share=size.parameters / whole.parameters,
            flops_share=size.flops / whole.flops,
            latency_share=_UNTIMED,
            latency_predicted=(
                None if latency is None else latency.without((*dead, *removed)) / latency.whole
            ),
            accuracy=found.accuracy,
            loss=found.mean_loss,
            drop=accuracy_drop(first, found),
            ms=_UNTIMED,
            speedup=_UNTIMED,
            worst=worst_class(first, found, labels, checkpoint.data.classes),
        )

    def timed(points: Sequence[Point]) -> list[Point]:
        """Time networks beside the network as it was built and the first of them."""
        removed = [(*dead, *each.removed) for each in points]
        distinct = list(dict.fromkeys([(), *removed]))
        runs = dict(zip(distinct, measure(distinct), strict=True))
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

    def bisect(finish: Callable[[Point], Point]) -> None:
        """Try networks within the step that passes the goal."""
        for _ in range(BISECTIONS):
            index = goal.overshoot(curve) if goal else None
            if index is None:
                return
            before, after = curve[index - 1].removed, curve[index].removed
            if len(after) - len(before) == 1:
                return
            removed = after[: (len(before) + len(after)) // 2]
            network = without(removed)
            found = predict(network, normalize, measuring)
            curve.insert(index, finish(point(network, removed, found)))

    if nested:
        report(
            f"sweep: {len(blocks)} blocks in the order of the nested training, statistics of"
            f" {len(statistics):,} training images, accuracy on {len(measuring):,} held-out images"
        )
    else:
        report(
            f"sweep: {len(blocks)} blocks, chosen on {len(choosing):,} held-out images, accuracy"
            f" measured on {len(measuring):,} others"
        )
    at_once = math.ceil(removable / STEPS)
    network, curve = model, [point(model, (), first)]
    while (done := len(curve[-1].removed)) < removable:
        if nested:
            gone = list(nested[::-1][done : min(done + at_once, removable)])
        else:
            predictions = leave_one_out(network, normalize, choosing)
            loss = predictions.pop(None).mean_loss
            rises = {block: said.mean_loss - loss for block, said in predictions.items() if block}
            ranked = sorted(rises, key=lambda block: cheapness(rises[block], saved[block]))
            gone = rewriting.removable(ranked, rises, stages)[:at_once]
        removed = (*curve[-1].removed, *gone)
        network = without(removed)
        curve.append(point(network, removed, predict(network, normalize, measuring)))
    bisect(lambda new: new)
    report(f"sweep: timing {len(curve)} networks")
    curve = timed(curve)
    if goal is not None and goal.by_latency:  # times that were predicted are measured now
        bisect(lambda new: timed([curve[0], new])[1])
    points = tuple(curve)
    return Sweep(
        nested=bool(nested),
        points=points,
        knee=knee([(each.parameters, each.accuracy) for each in points]),
        weight=weight,
        chosen_on=0 if nested else len(choosing),
        measured_on=len(measuring),
        timer=timer.name,
        seconds=time.perf_counter() - began,
    )


# -- Networks of a nested run

STATISTICS = 4096  # training images that batch-norm statistics are estimated on


def nested_network(
    model: fx.GraphModule, normalize: nn.Module, removed: Collection[str], images: ImageSet
) -> fx.GraphModule:
    """Return a copy of `model` without some blocks, its batch norms estimated again.

    Args:
        model, normalize: a gated network of a nested run, in evaluation mode.
        removed: its blocks to remove.
        images: training images, on the network's device.
    """
    network = copy.deepcopy(rewriting.remove_blocks(model, removed))
    size = min(BATCH, len(images))
    full = len(images) - len(images) % size
    batches = images.images[:full].split(size)
    reestimate_batchnorm(network, (normalize(batch) for batch in batches))
    return network


def cut(
    checkpoint: Checkpoint, data: Data, removed: Collection[str], device: torch.device = CPU
) -> Checkpoint:
    """Return the checkpoint of a nested run without some of its blocks.

    It is a gated network of its own: the blocks that are left keep their gates and records, batch
    norms are estimated again on training images, and its metrics are those of this network.

    Args:
        checkpoint: of a nested run.
        data: the data it was trained on.
        removed: blocks to remove; those of a sweep's point.
        device: where to compute.
    """
    normalize = Normalize.of(checkpoint.data).to(device)
    images = evaluation_samples(data.train, STATISTICS, device)
    network = nested_network(checkpoint.build_gated().eval().to(device), normalize, removed, images)
    gone = set(removed)
    scores = {
        name: asdict(score(network, normalize, part.to(device)))
        for name, part in (("validation", data.validation), ("test", data.test))
    }
    return replace(
        checkpoint,
        network=replace(
            checkpoint.network,
            gated=tuple(block for block in checkpoint.network.gated if block not in gone),
            removed=tuple(b for b in checkpoint.network.all_blocks() if b in gone),
        ),
        state=dict(network.cpu().state_dict()),
        gates=[record for record in checkpoint.gates if record.block not in gone],
        order=tuple(block for block in checkpoint.order if block not in gone),
        metrics={**checkpoint.metrics, **scores},
        side_head=None,
        resume=None,
        digest="",
    )


def worst_class(
    before: Predictions, after: Predictions, labels: npt.NDArray[np.int64], names: Sequence[str]
) -> ClassLoss | None:
    """Return the class that lost most accuracy, on the same images; None if none lost any."""
    counts = paired_counts(before.correct, after.correct, labels, len(names))
    losses = []
    for name, (lost, won, total) in zip(names, counts, strict=True):
        if lost > won:
            share = paired_difference(lost, won, total)
            drop = Interval(100 * share.value, 100 * share.low, 100 * share.high)
            losses.append(ClassLoss(name=name, samples=total, drop=drop))
    return max(losses, key=lambda loss: loss.drop.low, default=None)
