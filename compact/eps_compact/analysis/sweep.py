"""The sweep: block after block goes, always the one that is missed least for what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import fx

from eps_compact.analysis.importance import (
    CPU,
    PROBE,
    Answers,
    BranchCost,
    Forking,
    Measure,
    Timer,
    TorchTimer,
    accuracy_drop,
    answer,
    answer_all,
    block_times,
    branch_costs,
    live_network,
    ordered,
    pass_seconds,
    pixels,
    points,
    scaled,
)
from eps_core import cli
from eps_core.errors import ConfigError
from eps_core.stats import Interval, median, ratio_of_medians
from eps_core.timing import Runs
from eps_train.data.images import Part
from eps_train.gating import rewriting
from eps_train.models.cifar import Normalize
from eps_train.models.spec import Cost, cost
from eps_train.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    from rich.table import Table

# -- What a sweep found: networks ever smaller, the knee of their curve, and the one to take

KNEE_RULE = (
    "the point furthest above the straight line from the first to the last, accuracy over"
    " parameters, both scaled to 0..1"
)

Weight = Literal["parameters", "flops", "ms"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One network of the sweep.

    Attributes:
        removed: blocks that are gone beyond the dead ones, in the order in which they went.
        parameters, flops: of the network; FLOPs of one image.
        parameters_share, flops_share: of the network as it was built, at full depth (0..1).
        accuracy, loss: on the held-out images that choose nothing (0..1; cross-entropy).
        drop: points of accuracy lost against the first point, with Tango's 95 % interval.
        ms: median time of a call with one image, with its 95 % interval.
        speedup: the first point's median time over this one's, with its 95 % interval.
    """

    removed: tuple[str, ...]
    parameters: int
    flops: int
    parameters_share: float
    flops_share: float
    accuracy: float
    loss: float
    drop: Interval
    ms: Interval
    speedup: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Networks from the compact one down to one block a stage.

    Attributes:
        points: the first has lost only the dead blocks; each has lost one block more than the one
            before, or several where the time did not allow less. A stage keeps its last block.
        knee: index of the point where the curve bends: see `KNEE_RULE`.
        weight: what a rise in loss is divided by when the next block is chosen.
        chosen_on, measured_on: held-out images that the choices, and the accuracies, rest on; no
            image serves both.
        complete: whether it came to the last block that may go within its time.
        timer: what the times were measured with.
        seconds: what all of it took, once the timer was ready.
    """

    points: tuple[Point, ...]
    knee: int
    weight: Weight
    chosen_on: int
    measured_on: int
    complete: bool
    timer: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON holds it."""
        listed = [{**asdict(point), "removed": list(point.removed)} for point in self.points]
        return {**asdict(self), "points": listed, "knee_rule": KNEE_RULE}


def knee(curve: Sequence[tuple[float, float]]) -> int:
    """Index of the knee of a curve of (size, accuracy) from the largest network to the smallest.

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


class Measured(Protocol):
    """What a goal asks about one network of a sweep; `Point` has it."""

    @property
    def parameters_share(self) -> float: ...

    @property
    def flops_share(self) -> float: ...

    @property
    def drop(self) -> Interval: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """The network of a sweep that a user wants.

    With a target, the largest network that is small enough; with a limit to the drop alone, the
    smallest that keeps it. Drops are judged as measured, not by their intervals.

    Attributes:
        target_parameters, target_flops: share to keep of the network as it was built, 0..1.
        max_accuracy_drop: points of accuracy that may be lost against the first point.

    Raises:
        ConfigError: nothing asked for, or out of range.
    """

    target_parameters: float | None = None
    target_flops: float | None = None
    max_accuracy_drop: float | None = None

    def __post_init__(self) -> None:
        if self.max_accuracy_drop is None and not self.shares:
            raise ConfigError(
                "nothing to pick by: give --target-parameters, --target-flops or"
                " --max-accuracy-drop"
            )
        for (option, _), share in self.shares.items():
            if not 0 < share < 1:
                raise ConfigError(
                    f"{option} {share:g}: must lie between 0 and 1, the share to keep"
                )
        drop = self.max_accuracy_drop
        if drop is not None and not 0 <= drop <= 100:
            raise ConfigError(f"--max-accuracy-drop {drop:g}: must be 0 to 100 points")

    @property
    def shares(self) -> dict[tuple[str, str], float]:
        """The targets that are given, by option and attribute of a point."""
        shares = {
            ("--target-parameters", "parameters_share"): self.target_parameters,
            ("--target-flops", "flops_share"): self.target_flops,
        }
        return {names: share for names, share in shares.items() if share is not None}

    def small_enough(self, found: Measured) -> bool:
        return all(getattr(found, name) <= share for (_, name), share in self.shares.items())

    def accurate_enough(self, found: Measured) -> bool:
        # As in a deployment, rounding must not fail a drop of exactly the limit.
        limit = self.max_accuracy_drop
        return limit is None or found.drop.value <= limit + 1e-9

    def place(self, curve: Sequence[Measured]) -> int | None:
        """Index of the network wanted, on a curve from the largest to the smallest."""
        fitting = [
            index
            for index, found in enumerate(curve)
            if self.small_enough(found) and self.accurate_enough(found)
        ]
        if not fitting:
            return None
        return fitting[0] if self.shares else fitting[-1]

    def step(self, curve: Sequence[Measured]) -> int | None:
        """Index behind the step that leads too far: a network within it would be nearer the goal.

        None where the curve begins or ends before.
        """
        small = (index for index, found in enumerate(curve) if self.small_enough(found))
        place = self.place(curve)
        if not self.shares:
            place = None if place is None else place + 1
        elif place is None:
            place = next(small, None)
        return place if place is not None and 0 < place < len(curve) else None

    def told(self, found: Point) -> str:
        """One line: what was asked for, and what came of it."""
        asked = [f"{option} {share:g}" for (option, _), share in self.shares.items()]
        if self.max_accuracy_drop is not None:
            asked.append(f"--max-accuracy-drop {self.max_accuracy_drop:g}")
        count = len(found.removed)
        return (
            f"asked for {', '.join(asked)}; found {found.parameters_share:.1%} of the parameters"
            f" and {found.flops_share:.1%} of the FLOPs, {found.drop.value:+.1f} points lost,"
            f" {count} live block{'' if count == 1 else 's'} out"
        )


def pick(found: Sweep, goal: Goal) -> Point:
    """The point that meets all of `goal`. Raises ConfigError when no point does."""
    place = goal.place(found.points)
    if place is not None:
        return found.points[place]
    fitting = [point for point in found.points if goal.small_enough(point)]
    if not fitting:
        raise ConfigError(_too_small(found, goal))
    best = min(fitting, key=lambda point: point.drop.value)
    raise ConfigError(
        f"--max-accuracy-drop {goal.max_accuracy_drop:g}: no network of the sweep that is small"
        f" enough keeps it; the least drop among them is {best.drop.value:.2f} points, at"
        f" {best.parameters_share:.1%} of the parameters; allow that, or ask for a larger share"
    )


def _too_small(found: Sweep, goal: Goal) -> str:
    smallest = found.points[-1]
    option, share, reached = next(
        (option, share, getattr(smallest, name))
        for (option, name), share in goal.shares.items()
        if share < getattr(smallest, name)
    )
    what = "parameters" if option == "--target-parameters" else "FLOPs"
    why = ", as every stage keeps a block" if found.complete else ", where its time was over"
    return (
        f"{option} {share:g}: the smallest network of the sweep keeps {reached:.1%} of the"
        f" {what}{why}; ask for at least {math.ceil(1000 * reached) / 1000:g}"
    )


def table(found: Sweep) -> Table:
    """The sweep for people, one row a point, the knee marked."""
    title = (
        f"Sweep: chosen by loss per {found.weight} on {found.chosen_on:,} held-out images, accuracy"
        f" on {found.measured_on:,} others; times: {found.timer}"
        + ("" if found.complete else "; its time was over before the last block")
    )
    columns = ("removed", "parameters", "", "FLOPs", "", "ms", "faster", "accuracy", "points lost")
    rows = []
    before = 0
    for index, point in enumerate(found.points):
        gone = point.removed[before:]
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        before = len(point.removed)
        rows.append(
            (
                (f"{before}: {gone[0]}{more}" if gone else "dead blocks alone")
                + (" ◄ knee" if index == found.knee else ""),
                f"{point.parameters:,}",
                f"{point.parameters_share:.1%}",
                scaled(point.flops),
                f"{point.flops_share:.1%}",
                f"{point.ms.value:.3f}",
                f"{point.speedup.value:.2f}x",
                f"{point.accuracy:.2%}",
                points(point.drop),
            )
        )
    return cli.table(title, columns, rows)


SECONDS = 120.0
TIMING_SHARE = 0.15  # of the seconds
CHOOSING_SHARE = 0.5
MEASURING_SHARE = 0.25
TIMED = 0.8  # of what is left for times; intervals take the rest
LEAST = 64  # images to choose on, before blocks go several at a time
BISECTIONS = 3  # networks at most that are tried within a step that leads beyond a goal
TOGETHER = 24  # networks that are timed, and held in memory, at once


def sweep(
    checkpoint: Checkpoint,
    validation: Part,
    *,
    goal: Goal | None = None,
    weight: Weight = "parameters",
    seconds: float = SECONDS,
    device: torch.device = CPU,
    timer: Timer | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Sweep:
    """Take the live blocks out one after another, within `seconds`.

    At each step every block that is left is left out in turn. The next to go is the one with the
    least rise in cross-entropy for what its removal saves; of those whose loss does not rise, the
    one that saves most. The validation part is divided: on one half, or as much of it as the time
    allows, blocks are chosen; on the other the accuracies are measured. No other image is looked
    at. Where time is short, several blocks go in one step; the step that leads beyond `goal` is
    then divided. A stage keeps its last block, as in training (`rewriting.removable`).

    Args:
        checkpoint: gated, or plain: then all of its residual blocks take part.
        validation: its validation part.
        goal: the network wanted; None: the curve is all that is asked for.
        weight: what a block saves: `parameters`, `flops`, or `ms`.
        seconds: to spend in all. What `timer` takes to make ready is on top.
        device: where to compute.
        timer: measures the times; `timing.TorchTimer` if not given.
        report: told what is being done, a line at a time.

    Raises:
        ConfigError: no block is left, or `seconds` is too little for even one step.
        FileFormatError: the checkpoint's tensors are not those of its network.
        GraphError: `timer` cannot run the network.
    """
    timer = timer or TorchTimer(checkpoint.data)
    model = live_network(checkpoint)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalize = Normalize.of(checkpoint.data).to(device)
    heldout, shape = ordered(validation), checkpoint.data.input_shape
    stages = rewriting.stages(model, shape)
    costs = _costs(model, shape, stages)
    report(f"sweep: making ready to time the networks ({timer.name})")
    measure = timer.load(model, pixels(heldout, range(1), device).images)
    began = time.perf_counter()
    saved = _saved(costs, weight, measure, seconds * TIMING_SHARE / 2)
    deadline = began + seconds * (1 - TIMING_SHARE)
    whole = cost(checkpoint.network.skeleton(), shape)
    walk = _Walk(
        normalize,
        shape,
        stages=stages,
        whole=whole,
        saved=saved,
        deadline=deadline,
        report=report,
    )
    walk.plan(model, heldout, seconds)
    steps, complete = walk.go(model)
    if goal is not None:
        walk.refine(steps, goal)
    report(f"sweep: timing {len(steps)} networks")
    left = seconds - (time.perf_counter() - began)
    found = _points(steps, measure, TIMED * left)
    return Sweep(
        points=found,
        knee=knee([(point.parameters, point.accuracy) for point in found]),
        weight=weight,
        chosen_on=walk.chosen_on,
        measured_on=walk.measured_on,
        complete=complete,
        timer=timer.name,
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True, slots=True)
class _Stage:
    removed: tuple[str, ...]
    model: fx.GraphModule
    size: Cost
    parameters_share: float
    flops_share: float
    answers: Answers
    drop: Interval


class _Walk:
    """The steps of a sweep, paced so that they are done by the deadline."""

    def __init__(
        self,
        normalize: Normalize,
        shape: tuple[int, int, int],
        *,
        stages: Mapping[str, str],
        whole: Cost,
        saved: Mapping[str, float],
        deadline: float,
        report: Callable[[str], None],
    ) -> None:
        self._normalize, self._shape, self._whole = normalize, shape, whole
        self._saved, self._deadline, self._report = saved, deadline, report
        self._stages = stages

    def plan(self, model: fx.GraphModule, heldout: Part, seconds: float) -> None:
        """Decide on how many images to choose, and on how many to measure."""
        forking = Forking(model)
        blocks, available = len(forking.blocks), len(heldout)
        each = pass_seconds(forking, self._normalize, heldout) / min(PROBE, available)
        # One step takes `passes` passes, and the steps get shorter with the network: a third.
        step = each * forking.passes
        choosing = CHOOSING_SHARE * seconds
        self.chosen_on = min(available // 2, int(choosing / (step * blocks / 3)))
        self._at_once = 1
        if self.chosen_on < LEAST:
            self.chosen_on = min(available // 2, LEAST)
            self._at_once = math.ceil(self.chosen_on * step * blocks / 3 / choosing)
        if self.chosen_on * step > choosing:
            raise ConfigError(
                f"the sweep's {seconds:g} seconds are too few: a single step over {blocks} blocks"
                f" on {self.chosen_on} images takes about {self.chosen_on * step:.0f}; give it more"
            )
        fitting = int(MEASURING_SHARE * seconds / (each * (blocks / self._at_once / 2 + 1)))
        rest = available - self.chosen_on
        self.measured_on = min(rest, max(fitting, LEAST))
        device = self._normalize.mean.device
        self._choosing = pixels(heldout, range(self.chosen_on), device)
        self._measuring = pixels(
            heldout, range(self.chosen_on, self.chosen_on + self.measured_on), device
        )
        self._report(
            f"sweep: {blocks} blocks, chosen on {self.chosen_on:,} held-out images, accuracy"
            f" measured on {self.measured_on:,} others"
        )

    def go(self, model: fx.GraphModule) -> tuple[list[_Stage], bool]:
        """All stages, and whether the last has no block left that may go."""
        stages = [self._stage((), model)]
        while more := len(_removable(stages[-1].model, self._stages)):
            began = time.perf_counter()
            stages.append(self._step(stages[-1], stages[0]))
            taken = time.perf_counter() - began
            left = len(_removable(stages[-1].model, self._stages))
            next_step = taken * (left / more) ** 2
            if not self._pace(next_step, left):
                return stages, False
        return stages, True

    def refine(self, stages: list[_Stage], goal: Goal) -> None:
        """Bisect the step of several blocks that leads beyond `goal`, in place."""
        for _ in range(BISECTIONS):
            place = goal.step(stages)
            if place is None:
                return
            before, after = stages[place - 1], stages[place]
            group = after.removed[len(before.removed) :]
            if len(group) == 1:
                return
            gone = group[: len(group) // 2]
            self._report(f"sweep: dividing a step of {len(group)} blocks")
            model = rewriting.remove_blocks(before.model, gone)
            stages.insert(place, self._stage((*before.removed, *gone), model, stages[0]))

    def _pace(self, next_step: float, left: int) -> bool:
        """Settle how many blocks go at once from here; False when there is no time for a step."""
        remaining = self._deadline - time.perf_counter()
        if next_step > remaining:
            return not left
        # The rest one at a time takes a third of as many such steps.
        self._at_once = max(self._at_once, math.ceil(next_step * left / 3 / remaining))
        return True

    def _step(self, stage: _Stage, first: _Stage) -> _Stage:
        answers = answer_all(Forking(stage.model), self._normalize, self._choosing)
        whole = answers.pop(None).mean_loss
        rises = {block: found.mean_loss - whole for block, found in answers.items() if block}
        ranked = sorted(rises, key=lambda block: cheapness(rises[block], self._saved[block]))
        gone = rewriting.removable(ranked, rises, self._stages)[: self._at_once]
        removed = (*stage.removed, *gone)
        after = self._stage(removed, rewriting.remove_blocks(stage.model, gone), first)
        self._report(
            f"sweep: {len(after.removed)} out, last {gone[-1]}: accuracy"
            f" {after.answers.accuracy:.2%}, loss {after.answers.mean_loss:.3f}"
        )
        return after

    def _stage(
        self, removed: tuple[str, ...], model: fx.GraphModule, first: _Stage | None = None
    ) -> _Stage:
        answers = answer(model, self._normalize, self._measuring)
        size = cost(model, self._shape)
        return _Stage(
            removed=removed,
            model=model,
            size=size,
            parameters_share=size.parameters / self._whole.parameters,
            flops_share=size.flops / self._whole.flops,
            answers=answers,
            drop=accuracy_drop(answers if first is None else first.answers, answers),
        )


def _removable(model: fx.GraphModule, stages: Mapping[str, str]) -> list[str]:
    blocks = rewriting.gates(model)
    return rewriting.removable(blocks, blocks, stages)


def cheapness(rise: float, saved: float) -> tuple[float, float]:
    """Sorts blocks by how cheap it is to lose them, the next to go first.

    `rise` is that of the loss, `saved` what leaves with the block. A loss that does not rise ranks
    as one that stays: a gain below the noise is no reason to prefer a block that saves little.
    """
    return max(rise, 0.0) / max(saved, 1e-9), -saved


def _costs(
    model: fx.GraphModule, shape: tuple[int, int, int], stages: Mapping[str, str]
) -> list[BranchCost]:
    costs = branch_costs(model, shape)
    if not costs:
        raise ConfigError("every block is dead: there is none left for a sweep to take out")
    if not _removable(model, stages):
        raise ConfigError(
            "every block that is left is the last of its stage: there is none for a sweep to take"
            " out"
        )
    return costs


def _saved(
    costs: list[BranchCost], weight: Weight, measure: Measure, seconds: float
) -> dict[str, float]:
    if weight == "ms":
        times = block_times(costs, measure, seconds)
        return {block: interval.value for block, interval in times.items()}
    return {found.block: getattr(found, weight) for found in costs}


def _points(stages: list[_Stage], measure: Measure, seconds: float) -> tuple[Point, ...]:
    """The stages with their times, each measured beside the first one."""
    first, *rest = stages
    groups = [rest[at : at + TOGETHER] for at in range(0, len(rest), TOGETHER)] or [[]]
    found: list[Point] = []
    for group in groups:
        times = measure([stage.removed for stage in (first, *group)], seconds / len(groups))
        if not found:
            found.append(_point(first, times[0], times[0]))
        for stage, runs in zip(group, times[1:], strict=True):
            found.append(_point(stage, runs, times[0]))
    return tuple(found)


def _point(stage: _Stage, runs: Runs, first_runs: Runs) -> Point:
    return Point(
        removed=stage.removed,
        parameters=stage.size.parameters,
        flops=stage.size.flops,
        parameters_share=stage.parameters_share,
        flops_share=stage.flops_share,
        accuracy=stage.answers.accuracy,
        loss=stage.answers.mean_loss,
        drop=stage.drop,
        ms=median(runs),
        speedup=ratio_of_medians(first_runs, runs),
    )
