"""Learning-rate schedule: steps, restarts after epochs that lost a block, and a final decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eps_train.config import TrainingConfig

Steps = tuple[tuple[int | float, float], ...]
"""(from, value) pairs in ascending order: a step function."""


def value_at(steps: Steps, position: float) -> float:
    """The value of the last step that starts at or before `position`."""
    reached = [value for start, value in steps if start <= position]
    return reached[-1]


@dataclass(kw_only=True, slots=True)
class LearningRateSchedule:
    """Learning rate per epoch (paper, section 4.1, and the authors' code).

    The learning rate follows `lr_schedule` from the start, and `lr_restart` after every epoch that
    lost a block: one in which the count of discarded blocks, averaged over the epoch's steps, rose
    by at least 1 above its value at the last such epoch. From the first share of the run named in
    `final_decay` on, the learning rate is capped and restarts are ignored, so that no run ends on a
    high learning rate.
    """

    epochs: int
    lr_schedule: Steps
    lr_restart: Steps
    final_decay: Steps
    restarted_at: int | None = None
    discarded: float = 0.0

    @classmethod
    def of(cls, config: TrainingConfig) -> LearningRateSchedule:
        return cls(
            epochs=config.epochs,
            lr_schedule=config.lr_schedule,
            lr_restart=config.lr_restart,
            final_decay=config.final_decay,
        )

    @property
    def decay_epoch(self) -> int:
        """0-based epoch at which the final decay begins; `epochs` when there is none."""
        return round(self.final_decay[0][0] * self.epochs) if self.final_decay else self.epochs

    def lr(self, epoch: int) -> float:
        """Learning rate of the 0-based `epoch`, which is after every epoch observed so far."""
        if self.restarted_at is None:
            lr = value_at(self.lr_schedule, epoch)
        else:
            lr = value_at(self.lr_restart, epoch - self.restarted_at)
        caps = [cap for share, cap in self.final_decay if round(share * self.epochs) <= epoch]
        return min([lr, *caps])

    def observe(self, epoch: int, discarded: float) -> bool:
        """Record an epoch's mean count of discarded blocks; True when the epoch lost a block."""
        lost = discarded >= self.discarded + 1
        if lost:
            self.discarded = discarded
            if self.lr_restart and epoch + 1 < self.decay_epoch:
                self.restarted_at = epoch + 1
        return lost

    def state_dict(self) -> dict[str, Any]:
        return {"restarted_at": self.restarted_at, "discarded": self.discarded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restarted_at, self.discarded = state["restarted_at"], state["discarded"]
