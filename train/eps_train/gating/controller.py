"""Epsilon controller: adjusts epsilon during training to reach a share of the parameters.

The paper fixes epsilon for the whole run; which value removes how much depends on width, data and
length. Here the target is given. Between epochs the blocks with the smallest responses are chosen,
as many as the target requires by then; epsilon rises to just above their largest recorded response,
and all other gates stay open. Otherwise an epsilon that closes the weakest block on every step
would close its neighbours on most of theirs: responses vary by half from step to step, and by less
from block to block. The criterion for a dead block is the same as with a fixed epsilon.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from eps_train.config import TrainingConfig
from eps_train.gating.rewriting import removable
from eps_train.training.checkpoint import GateRecord

MARGIN = 1.05  # above the largest response of the last epoch, which the next may exceed a little
LEARN_FIRST = 0.1  # share of the run before the first block is chosen: responses mean little yet
RECENT = 3  # epochs; at a high learning rate a single validation is noisy, and too low


@dataclass(kw_only=True, slots=True)
class EpsilonController:
    """Chooses the blocks to prune next, and the epsilon that closes their gates.

    Attributes:
        target: parameters to keep at most.
        sizes: parameters that are removed with each block (`rewriting.branch_parameters`).
        whole: parameters of the network with all blocks.
        start, end: 0-based epochs between which the wanted count falls linearly from `whole` to
            `target`; from `end` on no block is chosen, so that the rest of the network can settle.
        stages: the stage of each block (`rewriting.stages`); each keeps one block.
        patience: epochs that a gate has to be closed for its block to be dead.
        max_drop: accuracy (0..1) that may be lost before no further block is chosen; None: any.
        epsilon: threshold of the chosen blocks' gates; all others are open.
        chosen: live blocks that are being pruned.
        held: epochs in which accuracy was too low to choose more blocks.
    """

    target: float
    sizes: Mapping[str, float]
    whole: float
    start: int
    end: int
    stages: Mapping[str, str]
    patience: int
    max_drop: float | None
    epsilon: float = 0.0
    chosen: frozenset[str] = frozenset()
    held: int = 0
    _accuracies: list[float] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        config: TrainingConfig,
        sizes: Mapping[str, int],
        whole: int,
        *,
        decay_epoch: int,
        stages: Mapping[str, str],
    ) -> EpsilonController:
        """The controller of a run whose final decay begins with the 0-based `decay_epoch`."""
        assert config.target_parameters is not None
        drop = config.max_accuracy_drop
        return cls(
            target=config.target_parameters * whole,
            sizes=sizes,
            whole=whole,
            stages=stages,
            start=max(config.epsilon_warmup, 1, round(LEARN_FIRST * config.epochs)),
            end=decay_epoch,
            patience=config.patience,
            max_drop=None if drop is None else drop / 100,
        )

    def threshold(self, block: str) -> float:
        """Epsilon of the block's gate in the next epoch; 0 holds it open."""
        return self.epsilon if block in self.chosen else 0.0

    def observe(
        self,
        epoch: int,
        records: Iterable[GateRecord],
        *,
        kept: float,
        accuracy: float,
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Record the 0-based `epoch` that ended, and decide on the next one.

        Args:
            epoch: the epoch that ended.
            records: of all gates, after it.
            kept: parameters of the network now, without its dead blocks.
            accuracy: on validation data, 0..1.
            scores: importance of every live block; the least important is chosen first. Without
                it, that is the block with the smallest response.
        """
        self._accuracies.append(accuracy)
        live = [record for record in records if record.death is None]
        if kept <= self.target:
            self.chosen, self.epsilon = frozenset(), 0.0
            return
        self.chosen &= {record.block for record in live}
        if self.start <= epoch + 1 < self.end:
            self._choose(live, kept - self._wanted(epoch + 1), scores)
        peaks = [record.peak for record in live if record.block in self.chosen]
        # Never below what it was: the responses of closed blocks shrink, and must stay below it.
        self.epsilon = max([self.epsilon, *(MARGIN * peak for peak in peaks)])

    def shortfall(self, kept: int) -> str | None:
        """One line for a run that ended with `kept` parameters; None when the target is met."""
        if kept <= self.target:
            return None
        share, wanted = kept / self.whole, self.target / self.whole
        left = f"{share:.0%} of the parameters are left, not {wanted:.0%}"
        if self.held:
            epochs = "1 epoch" if self.held == 1 else f"{self.held} epochs"
            return (
                f"{left}: in {epochs} accuracy was too low to prune more blocks;"
                " give a larger --max-accuracy-drop, or more --epochs"
            )
        return (
            f"{left}: the run was too short, or every stage is down to a block; give more --epochs"
        )

    def _wanted(self, epoch: int) -> float:
        """Parameters that should be left, chosen blocks not counted, in the 0-based `epoch`."""
        last = max(self.end - self.patience - 1, self.start)  # the last ones need time to die
        done = min(1.0, (epoch + 1 - self.start) / (last + 1 - self.start))
        return self.whole - done * (self.whole - self.target)

    def _choose(
        self, live: list[GateRecord], excess: float, scores: Mapping[str, float] | None
    ) -> None:
        """Choose the weakest blocks until `excess` parameters are to be removed."""
        excess -= sum(self.sizes[block] for block in self.chosen)
        if excess > 0 and self._harmed():
            self.held += 1
            return
        importance = {record.block: record.peak for record in live} if scores is None else scores
        free = [record.block for record in live if record.block not in self.chosen]
        for block in removable(sorted(free, key=importance.__getitem__), free, self.stages):
            if excess <= 0:
                return
            self.chosen |= {block}
            excess -= self.sizes[block]

    def _harmed(self) -> bool:
        """Whether accuracy is further below its best than `max_drop`, in all recent epochs."""
        if self.max_drop is None:
            return False
        return max(self._accuracies[-RECENT:]) < max(self._accuracies) - self.max_drop

    def state_dict(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon,
            "chosen": sorted(self.chosen),
            "held": self.held,
            "accuracies": list(self._accuracies),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epsilon, self.held = state["epsilon"], state["held"]
        self.chosen = frozenset(state["chosen"])
        self._accuracies = list(state["accuracies"])
