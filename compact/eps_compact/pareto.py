"""What a sweep found: networks ever smaller, the knee of their curve, and the one to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from eps_compact.intervals import Interval
from eps_compact.ledger import points, scaled
from eps_train import console
from eps_train.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

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
    return console.table(title, columns, rows)
