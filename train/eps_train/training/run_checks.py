"""Pre-flight checks of a run, and checks while it trains: warnings and errors with a remedy.

A false alarm would be worse than none: a warning is only given where the numbers leave little
doubt, and the tests hold the recipes against all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from eps_core.errors import TrainingError
from eps_train.config import TrainingConfig
from eps_train.data.images import Part
from eps_train.gating.gate import EpsilonGate
from eps_train.gating.pruning_state import watch_gates
from eps_train.gating.targets import BlockCosts, Target
from eps_train.schedule import LearningRateSchedule
from eps_train.training.checkpoint import GateRecord
from eps_train.training.distributed import ALONE, Group
from eps_train.training.evaluate import EpochMetrics, Score, logits
from eps_train.training.plots import Metrics

# -- Pre-flight checks

# Share of a closed branch's weights at the end of the run from which on no block is expected to
# die. Measured on digits: at 0.84 none of 15 blocks died (depth 32), at 0.46 none of 9, at 0.30
# three of 9 (depth 20), at 0.01 six of 15. So a run just below the limit may lose no block, but one
# above it has no prospect of it.
LASTING = 0.5
WANTED = 0.05  # share that the remedy aims at
STRONGEST = 0.01  # largest weight decay to suggest; 0.005 did well on digits and harm elsewhere
SILENT = 1e-3  # share of epsilon below which the first response shows a branch that starts at zero
IMAGES = 32  # passed through the network to find such branches


def schedule_warning(config: TrainingConfig, *, steps: int) -> str | None:
    """Why few blocks or none can die in a run of `steps` steps an epoch; None if they can."""
    if config.plain or config.nested:
        return None
    active = len(active_epochs(config))
    if active < config.patience:
        return (
            f"no block can die: epsilon acts in {active} epochs, and a gate has to be closed"
            f" for {config.patience}; give more --epochs"
        )
    if config.target is not None:
        return None  # the controller raises epsilon to blocks that do not shrink
    left = math.exp(-decay_exponent(config, steps=steps))
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
        f" {active * steps:,} steps, so only blocks whose response is below epsilon anyway can;"
        f" give {' or '.join(remedies)}"
    )


def decay_exponent(config: TrainingConfig, *, steps: int) -> float:
    """Exponent by which weight decay shrinks a closed branch over the run, without restarts.

    The sum of `lr * weight_decay / (1 - momentum)` over all steps on which epsilon acts
    (paper.md, "Tried on small data"); without the divisor for AdamW, whose decay does not pass
    through the momentum. Restarts only add to it.
    """
    schedule = LearningRateSchedule(config)
    lrs = sum(schedule.lr(epoch) for epoch in active_epochs(config))
    momentum = config.momentum if config.optimizer == "sgd" else 0.0
    return lrs * steps * config.weight_decay / (1 - momentum)


def active_epochs(config: TrainingConfig) -> range:
    """The 0-based epochs in which a fixed epsilon acts."""
    return range(config.epsilon_warmup, round(config.freeze_gates_at * config.epochs))


# Largest learning rates that leave pretrained weights what they are worth; above them, a few steps
# undo them. Usual for fine-tuning are 0.001 to 0.02 (SGD with momentum 0.9) and 1e-5 to 1e-3.
# Beside each, one to suggest.
GENTLE = {"sgd": (0.03, "0.02"), "adamw": (2e-3, "0.0005")}


def weights_warning(config: TrainingConfig) -> str | None:
    """Why a run destroys the weights that it starts from; None if it does not."""
    schedule = LearningRateSchedule(config)
    highest = max((schedule.lr(epoch) for epoch in range(config.epochs)), default=0.0)
    limit, gentle = GENTLE[config.optimizer]
    if config.optimizer == "sgd":
        limit *= (1 - config.momentum) / 0.1
    if highest <= limit:
        return None
    return (
        f"a learning rate of {highest:.2g} destroys pretrained weights in the first steps; give"
        f" --recipe finetune, or --lr-schedule cosine:{gentle}"
    )


def average_warning(config: TrainingConfig, *, steps: int) -> str | None:
    """Why the average of the weights lags behind in a run of `steps` steps an epoch."""
    span = 1 / (1 - config.ema) if config.ema else 0.0
    total = steps * config.epochs
    if span <= total / 5:
        return None
    return (
        f"--ema {config.ema:g} averages over about {span:,.0f} of the run's {total:,} steps, so"
        f" that early weights stay in it; give --ema {max(0.0, 1 - 20 / total):.3g} or less"
    )


def size_warnings(sizes: Mapping[str, int]) -> list[str]:
    """Warnings of blocks without parameters; `sizes` are those of `rewriting.branch_parameters`."""
    free = [block for block, size in sizes.items() if not size]
    if free and len(free) == len(sizes):
        return ["no block of this network frees a parameter when it is removed"]
    first = f"{len(free)} of {len(sizes)} blocks free no parameter when they are removed, the first"
    return [f"{first} {free[0]}"] if free else []


def unreachable_warning(target: Target, costs: BlockCosts, stages: Mapping[str, str]) -> str | None:
    """Warning of a target that no run can reach, by the costs in its currency; or None."""
    least = costs.least(stages)
    if least <= target.share:
        return None
    return (
        f"{target} cannot be reached: every stage keeps a block, and that leaves"
        f" {least:.0%} of the {target.unit}"
    )


def zero_branches_warning(
    model: nn.Module,
    normalize: nn.Module,
    gates: Mapping[str, EpsilonGate],
    images: Part,
    *,
    epsilon: float,
) -> str | None:
    """Warning of branches that start at zero, which `epsilon` closes from the first epoch for good.

    Libraries initialise the last norm of a branch with weight 0 (timm's ResNets), or scale the
    branch by 1e-6 (ConvNeXt): such a branch learns while its gate is open, but a gate that is
    closed at once passes no gradient. A few of `images` are evaluated; the model is not changed.
    """
    if not gates or not epsilon:
        return None
    with watch_gates(gates, EpsilonGate.measure) as peaks:
        logits(model, normalize, next(iter(images.batches(IMAGES))).images)
    silent = [block for block, seen in peaks.items() if max(map(float, seen)) < SILENT * epsilon]
    if not silent:
        return None
    return (
        f"{len(silent)} of {len(gates)} branches start at zero ({silent[0]}, ...), and an epsilon"
        " that acts from the first epoch shuts them before they can learn; give --epsilon-warmup,"
        " so that they train first"
    )


# -- Errors that end a run


def nonfinite_block(
    gates: Mapping[str, EpsilonGate], group: Group = ALONE
) -> tuple[str, int] | None:
    """The first block whose response was not finite, and the 1-based pass of this epoch; or None.

    Of all processes of `group`, the earliest pass counts; within it the first block in the
    network's order, because all blocks after it have non-finite responses too.
    """
    found = [
        (int(gate.finite_steps) + 1, order, block)
        for order, (block, gate) in enumerate(gates.items())
        if int(gate.finite_steps) < int(gate.steps)
    ]
    firsts = [first for first in group.gather(min(found, default=None)) if first is not None]
    if not firsts:
        return None
    passes, _, block = min(firsts)
    return block, passes


def require_no_collapse(
    records: Iterable[GateRecord],
    validation: Score,
    labels: Tensor,
    *,
    epoch: int,
    stages: Mapping[str, str],
) -> None:
    """Raise TrainingError when a whole stage died before the network has learned anything.

    "Learned" is a validation accuracy half-way from the share of the largest class to 1; `labels`
    are those of the validation part, int64 `[N]`, and `epoch` is 1-based.
    """
    chance = labels.bincount().max().item() / len(labels)
    if validation.accuracy >= (1 + chance) / 2:
        return
    if lost := dead_stages(records, stages):
        raise TrainingError(
            f"every block of {', '.join(lost)} died by epoch {epoch}, at a validation accuracy of"
            f" {validation.accuracy:.1%}: the threshold acts before the network has learned;"
            " lower --epsilon, or let it act later with --epsilon-warmup"
        )


def dead_stages(records: Iterable[GateRecord], stages: Mapping[str, str]) -> list[str]:
    """The stages whose blocks are all dead, in the order of computation."""
    alive = dict[str, bool]()
    for record in records:
        stage = stages.get(record.block, record.block)
        alive[stage] = alive.get(stage, False) or record.death is None
    return [stage for stage, any_alive in alive.items() if not any_alive]


# -- Warnings while a run trains

# Share of the guessing cross-entropy below which a network has learned something. A share of the
# accuracy, as in `require_no_collapse`, is reached late or never with many classes. At a half, a
# run on digits whose blocks died one by one, and that ended well, was warned of.
LEARNED = 0.75


class PruneLog:
    """Warns when blocks die too early, or all blocks of a stage; each warning is given once.

    Args:
        labels: of the validation part, int64 `[N]`.
        before: the lines of `metrics.jsonl` that a resumed run has behind it.
        records: of all gates, where it resumes: warnings about them have been given.
    """

    def __init__(
        self,
        config: TrainingConfig,
        labels: Tensor,
        stages: Mapping[str, str],
        *,
        before: Metrics = (),
        records: Iterable[GateRecord] = (),
    ) -> None:
        shares = labels.bincount().double() / len(labels)
        # Cross-entropy of a guess by the frequencies of the classes.
        self._guess = math.fsum(-share * math.log(share) for share in shares.tolist() if share)
        losses = [min(line["validation"]["loss"], line["loss"]) for line in before]
        self._loss = min(losses, default=math.inf)
        self._died_before = any(line["died"] for line in before)
        self._stages = stages
        self._lost = set(dead_stages(records, stages))
        first = "lower --epsilon" if config.target is None else config.target.relax
        self._remedy = f"{first}, or let it act later with --epsilon-warmup"

    def observe(self, metrics: EpochMetrics) -> list[str]:
        """The warnings for an epoch."""
        # The validation loss alone would mislead: at a high learning rate it swings widely.
        self._loss = min(self._loss, metrics.validation.loss, metrics.loss)
        warnings = []
        if metrics.died and not self._died_before and self._loss > self._guess * LEARNED:
            warnings.append(
                f"blocks died in epoch {metrics.epoch}, before the network has learned much: the"
                f" best loss so far is {self._loss:.2f}, where guessing gives {self._guess:.2f};"
                f" {self._remedy}"
            )
        self._died_before = self._died_before or bool(metrics.died)
        for stage in dead_stages(metrics.gates, self._stages):
            if stage not in self._lost:
                self._lost.add(stage)
                warnings.append(
                    f"every block of {stage} has died by epoch {metrics.epoch}, at"
                    f" a validation accuracy of {metrics.validation.accuracy:.1%}: only shortcuts"
                    f" are left there; if that is too much, {self._remedy}"
                )
        return warnings
