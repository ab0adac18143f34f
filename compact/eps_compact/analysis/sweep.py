"""Pruning sweep: remove live blocks step by step, least important first, down to one a stage."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from eps_compact.analysis.curve import ClassLoss, Goal, Point, Sweep, Weight, knee
from eps_compact.analysis.importance import (
    CPU,
    Predictions,
    accuracy_drop,
    evaluation_samples,
    leave_one_out,
    live_network,
    predict,
)
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
    BranchCost,
    Measure,
    Timer,
    TorchTimer,
    branch_costs,
    measure_latency,
)
from eps_train.gating.nested import reestimate_batchnorm, smallest_size
from eps_train.gating.targets import BlockCosts, cheapness
from eps_train.models.resnets import Normalize
from eps_train.models.spec import Cost, cost
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import BATCH, score

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
    subject = _subject(checkpoint, validation, samples=samples, train=train, device=device)
    began = time.perf_counter()
    report(f"sweep: preparing to time the networks ({timer.name})")
    times = _Times.of(
        checkpoint,
        subject,
        timer,
        by_block=weight == "ms" or (goal is not None and goal.by_latency),
    )
    saved: Mapping[str, float] = {}
    if weight != "ms":
        saved = {found.block: getattr(found, weight) for found in subject.costs}
    elif times.latency is not None:
        saved = times.latency.blocks
    report(subject.introduction())
    found = _Curve(subject, times, goal=goal, report=report)
    found.descend(saved)
    found.bisect()
    report(f"sweep: timing {len(found.points)} networks")
    found.time_all()
    if goal is not None and goal.by_latency:  # times that were predicted are measured now
        found.bisect(timed=True)
    points = tuple(found.points)
    return Sweep(
        nested=bool(subject.nested),
        points=points,
        knee=knee([(each.parameters, each.accuracy) for each in points]),
        weight=weight,
        chosen_on=0 if subject.nested else len(subject.choosing),
        measured_on=len(subject.measuring),
        timer=timer.name,
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """The network that a sweep makes shallower, and the images it is judged on.

    Attributes:
        model: with its live blocks, in evaluation mode.
        costs: of its blocks.
        stages: stage by block.
        removable: how many blocks can go.
        nested: the order of a nested run; else empty.
        choosing, measuring: images that choose the blocks, and that measure accuracies.
        statistics: training images for the batch norms of a nested run's networks.
        full: cost of the network as it was built.
        classes: their names.
    """

    model: fx.GraphModule
    normalize: Normalize
    shape: tuple[int, int, int]
    costs: list[BranchCost]
    stages: Mapping[str, str]
    removable: int
    nested: tuple[str, ...]
    choosing: ImageSet
    measuring: ImageSet
    statistics: ImageSet | None
    full: Cost
    classes: Sequence[str]

    def without(self, removed: Collection[str]) -> fx.GraphModule:
        """The network without some blocks."""
        if self.statistics is not None and removed:
            return nested_network(self.model, self.normalize, removed, self.statistics)
        return rewriting.remove_blocks(self.model, removed)

    def predictions(self, network: fx.GraphModule) -> Predictions:
        """What a network answers on the images that measure."""
        return predict(network, self.normalize, self.measuring)

    def introduction(self) -> str:
        """One line about how blocks are chosen, and on how many images."""
        measured = f"{len(self.measuring):,}"
        if self.statistics is not None:
            return (
                f"sweep: {len(self.costs)} blocks in the order of the nested training, statistics"
                f" of {len(self.statistics):,} training images, accuracy on {measured} held-out"
                " images"
            )
        return (
            f"sweep: {len(self.costs)} blocks, chosen on {len(self.choosing):,} held-out images,"
            f" accuracy measured on {measured} others"
        )


def _subject(
    checkpoint: Checkpoint,
    validation: Part,
    *,
    samples: int,
    train: Part | None,
    device: torch.device,
) -> _Subject:
    """Build the network of a sweep and draw its images; the arguments are those of `sweep`."""
    model = live_network(checkpoint)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
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
    statistics = None
    if nested:
        assert train is not None
        statistics = evaluation_samples(train, STATISTICS, device)
    return _Subject(
        model=model,
        normalize=Normalize.of(checkpoint.data).to(device),
        shape=shape,
        costs=costs,
        stages=stages,
        removable=removable,
        nested=nested,
        choosing=images[torch.arange(half)],
        measuring=images if nested else images[torch.arange(half, len(images))],
        statistics=statistics,
        full=cost(checkpoint.network.skeleton(), shape),
        classes=checkpoint.data.classes,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Times:
    """Times of networks, beside that of the network as it was built.

    Attributes:
        dead: blocks that were dead before the sweep.
        measure: times the network as it was built without some blocks.
        latency: its latency and that of each block; None where no block is chosen by it.
    """

    dead: tuple[str, ...]
    measure: Measure
    latency: BlockCosts | None

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, subject: _Subject, timer: Timer, *, by_block: bool
    ) -> _Times:
        image = subject.measuring.images[:1]
        built = live_network(checkpoint, dead=True).to(image.device)
        live = {found.block for found in subject.costs}
        measure = timer.load(built, image)
        return cls(
            dead=tuple(block for block in rewriting.gates(built) if block not in live),
            measure=measure,
            latency=measure_latency(built, image, timer, measure) if by_block else None,
        )

    def predict(self, removed: Sequence[str]) -> float | None:
        """Share of the latency without some blocks, from those of single blocks."""
        if self.latency is None:
            return None
        return self.latency.without((*self.dead, *removed)) / self.latency.whole

    def time(self, points: Sequence[Point]) -> list[Point]:
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


class _Curve:
    """The networks of a sweep, `points`, from the whole to the smallest."""

    def __init__(self, subject: _Subject, times: _Times, *, goal: Goal | None, report: Log) -> None:
        self._subject, self._times, self._goal, self._report = subject, times, goal, report
        self._first = subject.predictions(subject.model)
        self._labels = subject.measuring.labels.cpu().numpy()
        self.points = [self._point(subject.model, (), self._first)]

    def descend(self, saved: Mapping[str, float]) -> None:
        """Remove blocks until none can go; `saved` is what each saves."""
        subject = self._subject
        at_once = math.ceil(subject.removable / STEPS)
        network = subject.model
        while (done := len(self.points[-1].removed)) < subject.removable:
            if subject.nested:
                last = min(done + at_once, subject.removable)
                gone = list(subject.nested[::-1][done:last])
            else:
                predictions = leave_one_out(network, subject.normalize, subject.choosing)
                loss = predictions.pop(None).mean_loss
                rises = {
                    block: said.mean_loss - loss for block, said in predictions.items() if block
                }
                ranked = sorted(rises, key=lambda block: cheapness(rises[block], saved[block]))
                gone = rewriting.removable(ranked, rises, subject.stages)[:at_once]
            removed = (*self.points[-1].removed, *gone)
            network = subject.without(removed)
            self.points.append(self._point(network, removed, subject.predictions(network)))

    def bisect(self, *, timed: bool = False) -> None:
        """Try networks within the step that passes the goal; with `timed`, time them."""
        for _ in range(BISECTIONS):
            index = self._goal.overshoot(self.points) if self._goal else None
            if index is None:
                return
            before, after = self.points[index - 1].removed, self.points[index].removed
            if len(after) - len(before) == 1:
                return
            removed = after[: (len(before) + len(after)) // 2]
            network = self._subject.without(removed)
            new = self._point(network, removed, self._subject.predictions(network))
            if timed:
                new = self._times.time([self.points[0], new])[1]
            self.points.insert(index, new)

    def time_all(self) -> None:
        self.points = self._times.time(self.points)

    def _point(
        self, network: fx.GraphModule, removed: tuple[str, ...], found: Predictions
    ) -> Point:
        subject = self._subject
        size, full = cost(network, subject.shape), subject.full
        self._report(
            f"sweep: {len(removed)} of {subject.removable} blocks removed: accuracy"
            f" {found.accuracy:.2%}, loss {found.mean_loss:.3f}"
        )
        return Point(
            removed=removed,
            parameters=size.parameters,
            flops=size.flops,
            parameters_share=size.parameters / full.parameters,
            flops_share=size.flops / full.flops,
            latency_share=_UNTIMED,
            latency_predicted=self._times.predict(removed),
            accuracy=found.accuracy,
            loss=found.mean_loss,
            drop=accuracy_drop(self._first, found),
            ms=_UNTIMED,
            speedup=_UNTIMED,
            worst=worst_class(self._first, found, self._labels, subject.classes),
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
