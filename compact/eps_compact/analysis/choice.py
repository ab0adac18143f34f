"""What a user takes out beyond the dead blocks: along a sweep, to a target, trained on or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eps_core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from eps_compact.analysis.finetune import Finetuned
    from eps_compact.analysis.importance import Timer
    from eps_compact.analysis.sweep import Goal, Point, Sweep
    from eps_train.data.dataset import Data
    from eps_train.training.checkpoint import Checkpoint

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneOptions:
    """The options that ask for more than the dead blocks; names as on the command line."""

    importance: bool = False
    sweep: bool = False
    target_parameters: float | None = None
    target_flops: float | None = None
    max_accuracy_drop: float | None = None
    finetune_epochs: int = 0
    seconds: float | None = None
    timer: str | None = None
    device: str | None = None

    @property
    def picks(self) -> bool:
        """Whether a point of a sweep is asked for."""
        limits = (self.target_parameters, self.target_flops, self.max_accuracy_drop)
        return any(limit is not None for limit in limits)

    @property
    def times(self) -> bool:
        """Whether networks have to be timed."""
        return self.importance or self.sweeps

    @property
    def sweeps(self) -> bool:
        return self.sweep or self.picks

    def check(self, *, no_data: bool) -> None:
        """Raise ConfigError for what cannot go together."""
        named = {
            "--importance": self.importance,
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
                raise ConfigError(
                    f"--{option}: is for --importance and --sweep; give one of them too"
                )
        if self.device is not None and not (self.times or self.finetune_epochs):
            raise ConfigError(
                "--device: is for --importance, --sweep and --finetune-epochs; give one of them too"
            )

    @property
    def goal(self) -> Goal | None:
        """The network of a sweep that is asked for."""
        from eps_compact.analysis.sweep import Goal

        if not self.picks:
            return None
        return Goal(
            target_parameters=self.target_parameters,
            target_flops=self.target_flops,
            max_accuracy_drop=self.max_accuracy_drop,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What is to be compacted.

    Attributes:
        checkpoint: the one that was given, or what came of training it on.
        also: its live blocks that are to go besides the dead ones.
        sweep, goal, point: the curve, what was asked of it, and the point that was picked.
        tuned: how training on went; None without.
    """

    checkpoint: Checkpoint
    also: tuple[str, ...] = ()
    sweep: Sweep | None = None
    goal: Goal | None = None
    point: Point | None = None
    tuned: Finetuned | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the certificate says of it; empty when nothing was asked for."""
        told: dict[str, Any] = {}
        if self.sweep is not None:
            told["sweep"] = {**self.sweep.to_dict(), "goal": None}
        if self.sweep is not None and self.goal is not None and self.point is not None:
            told["sweep"]["goal"] = {
                "asked": asdict(self.goal),
                "point": self.sweep.points.index(self.point),
            }
        if self.tuned is not None:
            told["finetune"] = self.tuned.to_dict()
        return told


def choose(
    checkpoint: Checkpoint,
    data: Data,
    wishes: PruneOptions,
    timer: Timer | None,
    device: torch.device,
    report: Report,
) -> Selection:
    """Sweep, pick and train on, as far as `wishes` goes.

    Args:
        checkpoint, data: a trained network, and the data it was trained on.
        wishes: what is asked for.
        timer: times the networks of the sweep.
        device: where networks are run and trained.
        report: told what is being done, a line at a time.

    Raises:
        ConfigError: no point of the sweep has what is asked for, or there is nothing to sweep.
        TrainingError: training on did not stay finite.
    """
    from eps_compact.analysis import sweep as pareto
    from eps_compact.analysis.sweep import SECONDS, sweep

    swept = point = None
    goal = wishes.goal
    if wishes.sweeps:
        swept = sweep(
            checkpoint,
            data.validation,
            goal=goal,
            weight="flops"
            if wishes.target_flops and not wishes.target_parameters
            else "parameters",
            seconds=wishes.seconds or SECONDS,
            device=device,
            timer=timer,
            report=report,
        )
    if swept is not None and goal is not None:
        point = pareto.pick(swept, goal)
        report(goal.told(point))
    also = point.removed if point is not None else ()
    chosen = Selection(checkpoint=checkpoint, also=also, sweep=swept, goal=goal, point=point)
    if not wishes.finetune_epochs:
        return chosen
    tuned = _tune(checkpoint, data, also, wishes.finetune_epochs, device, report)
    if tuned.after < tuned.before:
        report(
            f"training on lost accuracy ({tuned.before:.2%} to {tuned.after:.2%} on held-out"
            " images): its result is left aside; give more --finetune-epochs, or none"
        )
        return chosen
    return replace(chosen, checkpoint=tuned.checkpoint, also=(), tuned=tuned)


def _tune(
    checkpoint: Checkpoint,
    data: Data,
    removed: tuple[str, ...],
    epochs: int,
    device: torch.device,
    report: Report,
) -> Finetuned:
    from eps_compact.analysis.finetune import finetune

    return finetune(
        checkpoint,
        data,
        removed,
        epochs=epochs,
        device=device,
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
