"""What the training loop tells about an epoch."""

from __future__ import annotations

from dataclasses import dataclass

from eps_train.checkpoint import GateRecord
from eps_train.evaluate import Score


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReport:
    """What one epoch brought; every figure is of the network that would ship after it.

    Attributes:
        epoch: 1-based.
        rate, epsilon: learning rate and threshold of the epoch.
        loss, train_accuracy: means over the epoch's steps, in training mode.
        validation: on the held-out part, dead blocks out, live gates open.
        discarded: blocks that did not act, averaged over the steps (dead ones count as 1).
        died: blocks latched at the end of this epoch.
        gates: all gates' records after this epoch.
        parameters: learned parameters left in the network, dead blocks gone.
        best: whether `ckpt.pt` was written.
        seconds: wall time, saving not included.
        images: training images seen.
    """

    epoch: int
    rate: float
    epsilon: float
    loss: float
    train_accuracy: float
    validation: Score
    discarded: float
    died: tuple[str, ...]
    gates: tuple[GateRecord, ...]
    parameters: int
    best: bool
    seconds: float
    images: int
