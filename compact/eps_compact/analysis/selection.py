"""Selection of live blocks to prune beyond the dead ones: sweep, targets, fine-tuning."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from eps_core.cli import Log
from eps_core.errors import ConfigError
from eps_train.gating.targets import TARGETS

if TYPE_CHECKING:
    import torch

    from eps_compact.analysis.curve import Goal, Point, Sweep, Weight
    from eps_compact.analysis.finetune import Finetuned
    from eps_train.data.dataset import Data
    from eps_train.gating.costs import Timer
    from eps_train.gating.targets import Currency
    from eps_train.training.checkpoint import Checkpoint
    from eps_train.training.evaluate import EpochMetrics

SAMPLES = 1000  # default of --samples


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneOptions:
    """The options that measure or remove live blocks; names as on the command line."""

    importance: bool = False
    sweep: bool = False
    target_parameters: float | None = None
    target_flops: float | None = None
    target_latency: float | None = None
    target_speedup: float | None = None
    max_accuracy_drop: float | None = None
    finetune_epochs: int = 0
    samples: int | None = None
    timer: str | None = None
    device: str | None = None

    @property
    def selects(self) -> bool:
        """Whether a point of a sweep is to be selected."""
        return any(getattr(self, name) is not None for name in (*TARGETS, "max_accuracy_drop"))

    @property
    def sweeps(self) -> bool:
        return self.sweep or self.selects

    @property
    def measures(self) -> bool:
        """Whether live blocks are left out and timed."""
        return self.importance or self.sweeps

    def check(self, *, no_data: bool) -> None:
        """Raise ConfigError for options that exclude or miss each other."""
        named = {
            "--importance": self.importance,
            "--sweep": self.sweep,
            "--target-parameters": self.target_parameters is not None,
            "--target-flops": self.target_flops is not None,
            "--target-latency": self.target_latency is not None,
            "--target-speedup": self.target_speedup is not None,
            "--max-accuracy-drop": self.max_accuracy_drop is not None,
            "--finetune-epochs": bool(self.finetune_epochs),
        }
        given = [option for option, wanted in named.items() if wanted]
        if no_data and given:
            raise ConfigError(f"--no-data: {given[0]} needs the held-out images; leave one out")
        if self.target_latency is not None and self.target_speedup is not None:
            raise ConfigError(
                "--target-latency and --target-speedup contradict each other: both set the latency;"
                " leave one of them out"
            )
        for option in ("samples", "timer"):
            if getattr(self, option) is not None and not self.measures:
                raise ConfigError(
                    f"--{option}: only applies to --importance and --sweep; give one of them too"
                )
        if self.device is not None and not (self.measures or self.finetune_epochs):
            raise ConfigError(
                "--device: only applies to --importance, --sweep and --finetune-epochs; give one"
                " of them too"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The network to be compacted.

    Attributes:
        checkpoint: the given one, the one that was cut from a nested run, or the fine-tuned one.
        nested: how that one was cut: `removed` blocks, and the accuracy of the `whole` and of the
            `cut` network on `samples` held-out images; None: it was not.
        also: its live blocks to remove besides the dead ones.
        sweep, goal, point: the curve, the goal, and the point that was selected.
        tuned: record of the fine-tuning; None without.
    """

    checkpoint: Checkpoint
    also: tuple[str, ...] = ()
    nested: dict[str, Any] | None = None
    sweep: Sweep | None = None
    goal: Goal | None = None
    point: Point | None = None
    tuned: Finetuned | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of the certificate; empty when nothing was asked for."""
        entries: dict[str, Any] = {}
        if self.sweep is not None:
            goal = None
            if self.goal is not None and self.point is not None:
                goal = {"asked": asdict(self.goal), "point": self.sweep.points.index(self.point)}
            entries["sweep"] = {**self.sweep.to_dict(), "goal": goal}
        if self.nested is not None:
            entries["nested"] = self.nested
        if self.tuned is not None:
            entries["finetune"] = self.tuned.to_dict()
        return entries


def select(
    checkpoint: Checkpoint,
    data: Data,
    options: PruneOptions,
    timer: Timer | None,
    device: torch.device,
    report: Log,
) -> Selection:
    """Sweep, select a point and fine-tune, as `options` ask for.

    Args:
        checkpoint, data: a trained network, and the data it was trained on.
        timer: measures the times of the sweep.
        device: where networks are run and trained.
        report: receives progress, a line at a time.

    Raises:
        ConfigError: no point of the sweep meets the goal, or no block is left to sweep.
        TrainingError: the loss did not stay finite in fine-tuning.
    """
    from eps_compact.analysis.curve import Goal, pick
    from eps_compact.analysis.finetune import finetune
    from eps_compact.analysis.sweep import cut, sweep

    selection = Selection(checkpoint=checkpoint)
    if options.sweeps:
        goal = None
        if options.selects:
            goal = Goal(
                target_parameters=options.target_parameters,
                target_flops=options.target_flops,
                target_latency=options.target_latency,
                target_speedup=options.target_speedup,
                max_accuracy_drop=options.max_accuracy_drop,
            )
        weights: dict[Currency, Weight] = {"flops": "flops", "latency": "ms"}
        first = goal.targets[0].currency if goal is not None and goal.targets else "parameters"
        swept = sweep(
            checkpoint,
            data.validation,
            samples=options.samples or SAMPLES,
            train=data.train,
            goal=goal,
            weight=weights.get(first, "parameters"),
            device=device,
            timer=timer,
            report=report,
        )
        selection = replace(selection, sweep=swept, goal=goal)
        if goal is not None:
            point = pick(swept, goal)
            report(goal.describe(point))
            selection = replace(selection, point=point, also=point.removed)
            if swept.nested and point.removed:
                smaller = cut(checkpoint, data, point.removed, device)
                nested = {
                    "removed": list(point.removed),
                    "whole": checkpoint.metrics["validation"]["accuracy"],
                    "cut": smaller.metrics["validation"]["accuracy"],
                    "samples": smaller.metrics["validation"]["samples"],
                    "test": smaller.metrics["test"],
                }
                selection = replace(selection, checkpoint=smaller, also=(), nested=nested)
    if not options.finetune_epochs:
        return selection

    def progress(epoch: EpochMetrics) -> None:
        report(
            f"fine-tuning, epoch {epoch.epoch}/{options.finetune_epochs}: loss {epoch.loss:.3f},"
            f" validation {epoch.validation.accuracy:.2%}"
        )

    tuned = finetune(
        selection.checkpoint,
        data,
        selection.also,
        epochs=options.finetune_epochs,
        device=device,
        teacher=checkpoint,
        report=progress,
    )
    if tuned.after < tuned.before:
        report(
            f"fine-tuning lost accuracy ({tuned.before:.2%} to {tuned.after:.2%} on held-out"
            " images): its result is discarded; give more --finetune-epochs, or none"
        )
        return selection
    return replace(selection, checkpoint=tuned.checkpoint, also=(), tuned=tuned)
