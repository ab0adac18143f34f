"""Learning-rate schedule: steps with restarts and a final decay, or a cosine; linear warm-up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eps_train.config import TrainingConfig

Steps = tuple[tuple[int | float, float], ...]
"""(from, value) pairs in ascending order: a step function."""

SETTLE_AT = 0.6  # share of a cosine run at which pruning to a target ends, as in the digits recipe


@dataclass(frozen=True, slots=True)
class CosineDecay:
    """Cosine decay over the whole run (Loshchilov and Hutter, 2017, 1608.03983, no restarts).

    The learning rate falls from `cosine` to 0 along half a period of the cosine.
    """

    cosine: float

    def at(self, share: float) -> float:
        """Learning rate when `share` (0..1) of the run is done."""
        return self.cosine * (1 + math.cos(math.pi * share)) / 2


LrSchedule = Steps | CosineDecay


def initial_lr(schedule: LrSchedule) -> float:
    """The learning rate that a schedule starts with, without warm-up."""
    return schedule.cosine if isinstance(schedule, CosineDecay) else schedule[0][1]


def value_at(steps: Steps, position: float) -> float:
    """The value of the last step that starts at or before `position`."""
    return [value for start, value in steps if start <= position][-1]


@dataclass(slots=True)
class LearningRateSchedule:
    """Learning rate of every step (paper, section 4.1, and the authors' code; or a cosine).

    The learning rate follows `lr_schedule` from the start, and `lr_restart` after every epoch that
    lost a block: one in which the count of discarded blocks, averaged over the epoch's steps, rose
    by at least 1 above its value at the last such epoch. From the first share of the run named in
    `final_decay` on, the learning rate is capped and restarts are ignored, so that no run ends on a
    high learning rate. Steps begin with an epoch; a cosine and the warm-up change every step.
    """

    config: TrainingConfig
    restarted_at: int | None = None
    discarded: float = 0.0

    @property
    def decay_epoch(self) -> int:
        """0-based epoch from which the network settles: no restart, and no block is chosen.

        It is where the final decay begins; without one, 60 % of a cosine, or the end of the run.
        """
        epochs = self.config.epochs
        if self.config.final_decay:
            return round(self.config.final_decay[0][0] * epochs)
        if isinstance(self.config.lr_schedule, CosineDecay):
            return round(SETTLE_AT * epochs)
        return epochs

    def lr(self, epoch: int, done: float = 0.5) -> float:
        """Learning rate in the 0-based `epoch`, which is after every epoch observed so far.

        `done` is the share of the epoch that is done (0..1).
        """
        config, position = self.config, epoch + done
        if isinstance(config.lr_schedule, CosineDecay):
            lr = config.lr_schedule.at(position / config.epochs)
        elif self.restarted_at is None:
            lr = value_at(config.lr_schedule, epoch)
        else:
            lr = value_at(config.lr_restart, epoch - self.restarted_at)
        caps = [cap for share, cap in config.final_decay if round(share * config.epochs) <= epoch]
        lr = min([lr, *caps])
        return lr * position / config.lr_warmup if position < config.lr_warmup else lr

    def observe(self, epoch: int, discarded: float) -> bool:
        """Record an epoch's mean count of discarded blocks; True when the epoch lost a block."""
        lost = discarded >= self.discarded + 1
        if lost:
            self.discarded = discarded
            if self.config.lr_restart and epoch + 1 < self.decay_epoch:
                self.restarted_at = epoch + 1
        return lost

    def state_dict(self) -> dict[str, Any]:
        return {"restarted_at": self.restarted_at, "discarded": self.discarded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restarted_at, self.discarded = state["restarted_at"], state["discarded"]
