"""The curve of a sweep: its networks, its knee, the network that meets a goal, and its tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from eps_compact.analysis.importance import points, scaled
from eps_core import cli
from eps_core.errors import ConfigError
from eps_core.stats import Interval
from eps_train.gating.targets import TARGETS, Currency, Target

if TYPE_CHECKING:
    from rich.table import Table

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
