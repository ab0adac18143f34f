"""Early warnings: what a run's plan, or its first deaths, say about how it will end.

Each is one line that says what, why and what helps. A false alarm would be worse than none: each
speaks only where the numbers leave little doubt, and the tests hold the recipes against them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from eps_train.checkpoint import GateRecord
from eps_train.config import TrainingConfig
from eps_train.deaths import watch_branches
from eps_train.epoch_report import EpochReport
from eps_train.evaluate import logits
from eps_train.gate import EpsilonGate, response
from eps_train.guards import lost_stages
from eps_train.images import Part
from eps_train.picture import Metrics
from eps_train.schedule import RateSchedule

# What is left of a closed branch's weights at the end of the run, from which on deaths cannot be
# hoped for. Measured on digits: at 0.84 none of 15 blocks died (depth 32), at 0.46 none of 9, at
# 0.30 three of 9 (depth 20), at 0.01 six of 15. So a run just below the line may yet lose none, but
# one above it has no such prospect.
LASTING = 0.5
WANTED = 0.05  # what the remedy aims at
STRONGEST = 0.01  # weight decay that it names at most; 0.005 did well on digits and harm elsewhere
# The share of the guesser's cross-entropy below which a network has learned something. A share of
# the accuracy, the measure of `guards.refuse_collapse`, is reached late or never where classes are
# many. At a half, a run on digits was warned of whose blocks died one by one and that ended well.
LEARNED = 0.75
SILENT = 1e-3  # share of epsilon below which a branch that responds so at first starts at zero
IMAGES = 32  # looked at for such branches; any would do


def before_training(config: TrainingConfig, *, steps: int) -> str | None:
    """Why few blocks or none can die in a run of `steps` steps an epoch; None if they can."""
    if config.plain:
        return None
    acting = len(_acting(config))
    if acting < config.closed_epochs:
        return (
            f"no block can die: epsilon acts in {acting} epochs, and a gate has to be closed"
            f" through {config.closed_epochs}; give more --epochs"
        )
    if config.target_parameters is not None:
        return None  # an epsilon that is led reaches for blocks that do not shrink
    left = math.exp(-decay(config, steps=steps))
    if left <= LASTING:
        return None
    remedies = ["--target-parameters"]
    if left < 0.999:
        factor = math.log(WANTED) / math.log(left)
        if config.weight_decay * factor <= STRONGEST:
            remedies.insert(0, f"--weight-decay {config.weight_decay * factor:.2g}")
        remedies.insert(0, f"--epochs {math.ceil(config.epochs * factor)}")
    return (
        f"few blocks or none will die: weight decay leaves {left:.0%} of a closed branch after"
        f" {acting * steps:,} steps, so only those that respond below epsilon anyhow can; give"
        f" {' or '.join(remedies)}"
    )


def unreachable(
    config: TrainingConfig, sizes: Mapping[str, int], whole: int, stages: Mapping[str, str]
) -> list[str]:
    """What no run of this network can reach.

    Args:
        config: of the run.
        sizes: parameters that leave with each block (`branches.branch_parameters`).
        whole: parameters of the whole network.
        stages: the stage of each block (`graph.stages`).
    """
    found = []
    free = [block for block, size in sizes.items() if not size]
    if free and len(free) == len(sizes):
        found.append("no block of this network frees a parameter when it goes")
    elif free:
        found.append(
            f"{len(free)} of {len(sizes)} blocks free no parameter when they go, the first"
            f" {free[0]}"
        )
    if config.target_parameters is not None:
        kept: dict[str, int] = {}
        for block, size in sizes.items():
            kept[stages[block]] = min(size, kept.get(stages[block], size))
        least = (whole - sum(sizes.values()) + sum(kept.values())) / whole
        if least > config.target_parameters:
            found.append(
                f"--target-parameters {config.target_parameters:g} cannot be reached: every stage"
                f" keeps a block, and that leaves {least:.0%} of the parameters"
            )
    return found


def _acting(config: TrainingConfig) -> range:
    """The 0-based epochs in which a fixed epsilon acts."""
    return range(config.epsilon_from, round(config.settle_at * config.epochs))


def decay(config: TrainingConfig, *, steps: int) -> float:
    """Exponent by which weight decay shrinks a closed branch over the run, without restarts.

    The sum of `rate * weight_decay / (1 - momentum)` over all steps on which epsilon acts
    (paper.md, "Tried on small data"). Restarts only add to it.
    """
    schedule = RateSchedule(
        epochs=config.epochs, rates=config.rates, restart=config.restart, descent=config.descent
    )
    rates = sum(schedule.rate(epoch) for epoch in _acting(config))
    return rates * steps * config.weight_decay / (1 - config.momentum)


def zero_branches(
    model: nn.Module,
    normalize: nn.Module,
    gates: Mapping[str, EpsilonGate],
    images: Part,
    *,
    epsilon: float,
) -> str | None:
    """Which branches start at zero, so that an `epsilon` that acts at once closes them for good.

    Libraries start the last norm of a branch at weight 0 (timm's ResNets), or scale the branch by
    1e-6 (ConvNeXt): such a branch learns while its gate is open, but a gate that is closed at once
    lets no gradient in. A few of `images` pass in evaluation mode, which leaves no trace.
    """
    if not gates or not epsilon:
        return None
    with watch_branches(gates, response) as peaks:
        logits(model, normalize, next(iter(images.batches(IMAGES))).images)
    silent = [block for block, seen in peaks.items() if max(map(float, seen)) < SILENT * epsilon]
    if not silent:
        return None
    return (
        f"{len(silent)} of {len(gates)} branches start at zero ({silent[0]}, ...), and an epsilon"
        " that acts from the first epoch shuts them before they can learn; give --epsilon-from, so"
        " that they train first"
    )


class DeathWatch:
    """Says when blocks die too early, or all of a stage; each of it once in a run."""

    def __init__(
        self,
        config: TrainingConfig,
        labels: Tensor,
        stages: Mapping[str, str],
        *,
        before: Metrics = (),
        records: Iterable[GateRecord] = (),
    ) -> None:
        """Begin to watch a run.

        Args:
            config: its configuration.
            labels: of the validation part, int64 `[N]`.
            stages: the stage of each block (`graph.stages`).
            before: the lines of `metrics.jsonl` that a resumed run has behind it.
            records: of all gates, where it resumes: what they tell was told.
        """
        self._led = config.target_parameters is not None
        self._guess = _entropy(labels)
        losses = [min(line["validation"]["loss"], line["loss"]) for line in before]
        self._loss = min(losses, default=math.inf)
        self._died_before = any(line["died"] for line in before)
        self._stages = stages
        self._lost = set(lost_stages(records, stages))

    def observe(self, report: EpochReport) -> list[str]:
        """The warnings that an epoch gives cause for."""
        # Validation alone would be a false witness: at a high rate it swings by tens of points.
        self._loss = min(self._loss, report.validation.loss, report.loss)
        warnings = []
        if report.died and not self._died_before and self._loss > self._guess * LEARNED:
            warnings.append(
                f"blocks died in epoch {report.epoch}, before the network has learned much: the"
                f" best loss so far is {self._loss:.2f}, where guessing gives {self._guess:.2f};"
                f" {self._remedy}"
            )
        self._died_before = self._died_before or bool(report.died)
        for stage in lost_stages(report.gates, self._stages):
            if stage not in self._lost:
                self._lost.add(stage)
                warnings.append(
                    f"every block of {stage} has died by epoch {report.epoch}, at"
                    f" a validation accuracy of {report.validation.accuracy:.1%}: only shortcuts"
                    f" are left there; if that is too much, {self._remedy}"
                )
        return warnings

    @property
    def _remedy(self) -> str:
        first = "raise --target-parameters" if self._led else "lower --epsilon"
        return f"{first}, or let it act later with --epsilon-from"


def _entropy(labels: Tensor) -> float:
    """Cross-entropy of one who knows how frequent the classes are, and nothing else."""
    shares = labels.bincount().double() / len(labels)
    return math.fsum(-share * math.log(share) for share in shares.tolist() if share)
