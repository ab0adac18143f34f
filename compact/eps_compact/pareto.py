"""What a sweep found: networks ever smaller, the knee of their curve, and the one to take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

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
    """Networks from the compact one down to bare shortcuts.

    Attributes:
        points: the first has lost only the dead blocks; each has lost one block more than the one
            before, or several where the time did not allow less.
        knee: index of the point where the curve bends: see `KNEE_RULE`.
        weight: what a rise in loss is divided by when the next block is chosen.
        chosen_on, measured_on: held-out images that the choices, and the accuracies, rest on; no
            image serves both.
        complete: whether it came to the last block within its time.
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


def pick(
    found: Sweep,
    *,
    target_parameters: float | None = None,
    target_flops: float | None = None,
    max_accuracy_drop: float | None = None,
) -> Point:
    """The point that meets all that is asked for.

    With a target, the largest network that is small enough; with a limit to the drop alone, the
    smallest that keeps it. Drops are judged as measured, not by their intervals.

    Args:
        target_parameters, target_flops: share to keep of the network as it was built, 0..1.
        max_accuracy_drop: points of accuracy that may be lost against the first point.

    Raises:
        ConfigError: nothing asked for, out of range, or no point has it.
    """
    shares = {"--target-parameters": target_parameters, "--target-flops": target_flops}
    if max_accuracy_drop is None and target_parameters is None and target_flops is None:
        raise ConfigError(
            "nothing to pick by: give --target-parameters, --target-flops or --max-accuracy-drop"
        )
    for option, share in shares.items():
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"{option} {share:g}: must lie between 0 and 1, the share to keep")
    if max_accuracy_drop is not None and not 0 <= max_accuracy_drop <= 100:
        raise ConfigError(f"--max-accuracy-drop {max_accuracy_drop:g}: must be 0 to 100 points")
    fitting = [
        point
        for point in found.points
        if (target_parameters is None or point.parameters_share <= target_parameters)
        and (target_flops is None or point.flops_share <= target_flops)
    ]
    if not fitting:
        raise ConfigError(_too_small(found, shares))
    if max_accuracy_drop is None:
        return fitting[0]
    # As in a deployment, rounding must not fail a drop of exactly the limit.
    kept = [point for point in fitting if point.drop.value <= max_accuracy_drop + 1e-9]
    if not kept:
        best = min(fitting, key=lambda point: point.drop.value)
        raise ConfigError(
            f"--max-accuracy-drop {max_accuracy_drop:g}: no network of the sweep that is small"
            f" enough keeps it; the least drop among them is {best.drop.value:.2f} points, at"
            f" {best.parameters_share:.1%} of the parameters; allow that, or ask for a larger share"
        )
    only_limit = target_parameters is None and target_flops is None
    return min(kept, key=lambda point: point.parameters) if only_limit else kept[0]


def _too_small(found: Sweep, shares: Mapping[str, float | None]) -> str:
    smallest = found.points[-1]
    reached = {
        "--target-parameters": smallest.parameters_share,
        "--target-flops": smallest.flops_share,
    }
    option, share = next(
        (name, share)
        for name, share in shares.items()
        if share is not None and share < reached[name]
    )
    what = "parameters" if option == "--target-parameters" else "FLOPs"
    why = "" if found.complete else ", where its time was over"
    return (
        f"{option} {share:g}: the smallest network of the sweep keeps {reached[option]:.1%} of the"
        f" {what}{why}; ask for at least {math.ceil(1000 * reached[option]) / 1000:g}"
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
