"""The learning rate: steps, restarted after every epoch that lost a block, with a last descent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Steps = tuple[tuple[int | float, float], ...]
"""(from, value) pairs in ascending order: a step function."""


def value_at(steps: Steps, position: float) -> float:
    """The value of the last step that starts at or before `position`."""
    reached = [value for start, value in steps if start <= position]
    return reached[-1]


@dataclass(kw_only=True, slots=True)
class LearningRateSchedule:
    """Learning rate per epoch (paper, section 4.1, and the authors' code).

    The rate follows `rates` from the start, and `restart` anew after every epoch that lost a block:
    one in which the count of discarded blocks, averaged over the epoch's steps, rose by at least 1
    above where it stood at the last such epoch. From the first share of the run named in `descent`
    on, the rate is capped and restarts are ignored, so that no run ends on a high rate.
    """

    epochs: int
    lr_schedule: Steps
    lr_restart: Steps
    final_decay: Steps
    restarted_at: int | None = field(default=None)
    discarded: float = field(default=0.0)

    @property
    def descent_epoch(self) -> int:
        """0-based epoch at which the last descent begins; `epochs` when there is none."""
        return round(self.final_decay[0][0] * self.epochs) if self.final_decay else self.epochs

    def rate(self, epoch: int) -> float:
        """Learning rate of the 0-based `epoch`, which lies behind every epoch observed so far."""
        if self.restarted_at is None:
            rate = value_at(self.lr_schedule, epoch)
        else:
            rate = value_at(self.lr_restart, epoch - self.restarted_at)
        caps = [cap for share, cap in self.final_decay if round(share * self.epochs) <= epoch]
        return min([rate, *caps])

    def observe(self, epoch: int, discarded: float) -> bool:
        """Take note of an epoch's mean count of discarded blocks; True when it lost a block."""
        lost = discarded >= self.discarded + 1
        if lost:
            self.discarded = discarded
            if self.lr_restart and epoch + 1 < self.descent_epoch:
                self.restarted_at = epoch + 1
        return lost

    def state(self) -> dict[str, Any]:
        return {"restarted_at": self.restarted_at, "discarded": self.discarded}

    def restore(self, state: dict[str, Any]) -> None:
        self.restarted_at = state["restarted_at"]
        self.discarded = state["discarded"]
