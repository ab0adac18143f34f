"""When a run must not go on."""

from __future__ import annotations

import pytest

from eps_core.errors import TrainingError
from eps_train.training import guards
from eps_train.training.checkpoint import GateRecord, PruneRecord
from eps_train.training.evaluate import Score
from tests.train.runs import digits


def test_a_stage_that_dies_before_anything_was_learned() -> None:
    death = PruneRecord(epoch=2, epsilon=1.0, steps=20, peak=0.5, heldout_peak=0.5, samples=9)
    dead = GateRecord(block="one", epsilon=1.0, steps=10, closed_steps=10, peak=0.5, death=death)
    with pytest.raises(TrainingError, match=r"^every block of the first died by epoch 5"):
        guards.refuse_collapse(
            [dead], Score(0.2, 2.0, 9), digits(), epoch=5, stages={"one": "the first"}
        )
