"""What a user takes out beyond the dead blocks: along a sweep, to a target, trained on or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eps_train.errors import ConfigError

if TYPE_CHECKING:
    from eps_compact.finetune import Finetuned
    from eps_compact.pareto import Point, Sweep
    from eps_compact.timing import Timer
    from eps_train.checkpoint import Checkpoint
    from eps_train.data import Data

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """The options that ask for more than the dead blocks; names as on the command line."""

    ledger: bool = False
    sweep: bool = False
    target_parameters: float | None = None
    target_flops: float | None = None
    max_accuracy_drop: float | None = None
    finetune_epochs: int = 0
    seconds: float | None = None
    timer: str | None = None

    @property
    def picks(self) -> bool:
        """Whether a point of a sweep is asked for."""
        limits = (self.target_parameters, self.target_flops, self.max_accuracy_drop)
        return any(limit is not None for limit in limits)

    @property
    def times(self) -> bool:
        """Whether networks have to be timed."""
        return self.ledger or self.sweeps

    @property
    def sweeps(self) -> bool:
        return self.sweep or self.picks

    def check(self, *, no_data: bool) -> None:
        """Raise ConfigError for what cannot go together."""
        named = {
            "--ledger": self.ledger,
            "--sweep": self.sweep,
            "--target-parameters": self.target_parameters is not None,
            "--target-flops": self.target_flops is not None,
            "--max-accuracy-drop": self.max_accuracy_drop is not None,
            "--finetune-epochs": bool(self.finetune_epochs),
        }
        given = [option for option, wanted in named.items() if wanted]
        if no_data and given:
            raise ConfigError(f"--no-data: {given[0]} needs the held-out images; leave one out")
        for option in ("seconds", "timer"):
            if getattr(self, option) is not None and not self.times:
                raise ConfigError(f"--{option}: is for --ledger and --sweep; give one of them too")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What is to be compacted.

    Attributes:
        checkpoint: the one that was given, or what came of training it on.
        also: its live blocks that are to go besides the dead ones.
        sweep, point: the curve, and the point on it that was picked.
        tuned: how training on went; None without.
    """

    checkpoint: Checkpoint
    also: tuple[str, ...] = ()
    sweep: Sweep | None = None
    point: Point | None = None
    tuned: Finetuned | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the certificate says of it; empty when nothing was asked for."""
        told: dict[str, Any] = {}
        if self.sweep is not None:
            told["sweep"] = self.sweep.to_dict()
        if self.tuned is not None:
            told["finetune"] = self.tuned.to_dict()
        return told


def choose(
    checkpoint: Checkpoint, data: Data, wishes: Wishes, timer: Timer | None, report: Report
) -> Choice:
    """Sweep, pick and train on, as far as `wishes` goes; `timer` times the networks of the sweep.

    Raises:
        ConfigError: no point of the sweep has what is asked for, or there is nothing to sweep.
        TrainingError: training on did not stay finite.
    """
    from eps_compact import pareto
    from eps_compact.sweep import SECONDS, sweep

    swept = point = None
    if wishes.sweeps:
        swept = sweep(
            checkpoint,
            data.validation,
            weight="flops"
            if wishes.target_flops and not wishes.target_parameters
            else "parameters",
            seconds=wishes.seconds or SECONDS,
            timer=timer,
            report=report,
        )
    if swept is not None and wishes.picks:
        point = pareto.pick(
            swept,
            target_parameters=wishes.target_parameters,
            target_flops=wishes.target_flops,
            max_accuracy_drop=wishes.max_accuracy_drop,
        )
    also = point.removed if point is not None else ()
    if not wishes.finetune_epochs:
        return Choice(checkpoint=checkpoint, also=also, sweep=swept, point=point)
    tuned = _tune(checkpoint, data, also, wishes.finetune_epochs, report)
    if tuned.after < tuned.before:
        report(
            f"training on lost accuracy ({tuned.before:.2%} to {tuned.after:.2%} on held-out"
            " images): its result is left aside; give more --finetune-epochs, or none"
        )
        return Choice(checkpoint=checkpoint, also=also, sweep=swept, point=point)
    return Choice(checkpoint=tuned.checkpoint, sweep=swept, point=point, tuned=tuned)


def _tune(
    checkpoint: Checkpoint, data: Data, removed: tuple[str, ...], epochs: int, report: Report
) -> Finetuned:
    from eps_compact.finetune import finetune

    return finetune(
        checkpoint,
        data,
        removed,
        epochs=epochs,
        report=lambda epoch: report(
            f"trained on, epoch {epoch.epoch}/{epochs}: loss {epoch.loss:.3f}, validation"
            f" {epoch.validation.accuracy:.2%}"
        ),
    )


def pareto_file(output: Path) -> Path:
    """Where the curve of the sweep is drawn."""
    return output.with_name("pareto.png")


def tuned_file(output: Path) -> Path:
    """Where the checkpoint goes that the compact network was trained on to."""
    return output.with_name("tuned.pt")
