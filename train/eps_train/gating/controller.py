"""Epsilon controller: adjusts epsilon during training to reach a target.

The paper fixes epsilon for the whole run; which value removes how much depends on width, data and
length. Here the target is given: a share of the parameters, FLOPs or latency. Between epochs the
least important blocks are chosen, as many as the target requires by then; epsilon rises to just
above their largest recorded response, and all other gates stay open. Otherwise an epsilon that
closes the weakest block on every step would close its neighbours on most of theirs: responses vary
by half from step to step, and by less from block to block. The criterion for a dead block is the
same as with a fixed epsilon.

The stages of the network lose the same share of their blocks, and within a stage the block with the
least importance per cost goes first. Importance says less about blocks of different stages: chosen
over all stages of a network for CIFAR-10, blocks cost 0.3 to 1.1 points more accuracy (three seeds,
docs/results.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from eps_train.gating.rewriting import removable
from eps_train.gating.targets import BlockCosts, Target, cheapness
from eps_train.training.checkpoint import GateRecord

MARGIN = 1.05  # above the largest response of the last epoch, which the next may exceed a little
LEARN_FIRST = 0.1  # share of the run before the first block is chosen: responses mean little yet
# Share of the run in which all blocks are chosen: the sooner they are gone, the more epochs there
# are for the network that is left, and the less each one costs.
CHOOSE_WITHIN = 0.1
RECENT = 3  # epochs; at a high learning rate a single validation is noisy, and too low


@dataclass(kw_only=True, slots=True)
class EpsilonController:
    """Chooses the blocks to prune next, and the epsilon that closes their gates.

    Attributes:
        target: share to keep.
        costs: of the network and its blocks, in the currency of `target`.
        stages: the stage of each block (`rewriting.stages`); each keeps one block.
        epochs: of the run.
        end: 0-based epoch from which on no block is chosen, so that the rest of the network can
            settle.
        patience: epochs that a gate has to be closed for its block to be dead.
        max_accuracy_drop: percentage points that may be lost before no further block is chosen;
            None: any. With it blocks are chosen until `end`, so that accuracy can recover between;
            without it, within a tenth of the run.
        criterion: that orders the blocks; see `pruning_state.BlockScores`.
        warmup: epochs before the first block is chosen, at least.
        epsilon: threshold of the chosen blocks' gates; all others are open.
        chosen: live blocks that are being pruned.
        held: epochs in which accuracy was too low to choose more blocks.
    """

    target: Target
    costs: BlockCosts
    stages: Mapping[str, str]
    epochs: int
    end: int
    patience: int
    max_accuracy_drop: float | None
    criterion: str
    warmup: int = 0
    epsilon: float = 0.0
    chosen: frozenset[str] = frozenset()
    held: int = 0
    _accuracies: list[float] = field(default_factory=list)

    @property
    def start(self) -> int:
        """0-based epoch in which the first blocks are chosen."""
        return max(self.warmup, 1, round(LEARN_FIRST * self.epochs))

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
            kept: cost of the network now, without its dead blocks.
            accuracy: on validation data, 0..1.
            scores: importance of every live block; without it, that is its largest response.
        """
        self._accuracies.append(accuracy)
        live = [record for record in records if record.death is None]
        if kept <= self._limit:
            self.chosen, self.epsilon = frozenset(), 0.0
            return
        self.chosen &= {record.block for record in live}
        if self.start <= epoch + 1 < self.end:
            self._choose(live, kept - self._wanted(epoch + 1), scores)
        peaks = [record.peak for record in live if record.block in self.chosen]
        # Never below what it was: the responses of closed blocks shrink, and must stay below it.
        self.epsilon = max([self.epsilon, *(MARGIN * peak for peak in peaks)])

    def shortfall(self, kept: float) -> str | None:
        """One line for a run that ended at a cost of `kept`; None when the target is met."""
        if kept <= self._limit:
            return None
        unit = self.target.unit
        share = f"{kept / self.costs.whole:.1%} of the {unit} {'is' if unit[-1] == 'y' else 'are'}"
        left = f"{share} left, not {self.target.share:.1%}"
        if self.held:
            epochs = "1 epoch" if self.held == 1 else f"{self.held} epochs"
            return (
                f"{left}: in {epochs} accuracy was too low to prune more blocks;"
                " give a larger --max-accuracy-drop, or more --epochs"
            )
        return (
            f"{left}: the run was too short, or every stage is down to a block; give more --epochs"
        )

    @property
    def _limit(self) -> float:
        """Cost to keep at most."""
        return self.target.share * self.costs.whole

    def _wanted(self, epoch: int) -> float:
        """Cost that should be left, chosen blocks not counted, in the 0-based `epoch`.

        From `start` on it falls linearly from that of the whole network to the target.
        """
        last = max(self.end - self.patience - 1, self.start)  # the last ones need time to die
        if self.max_accuracy_drop is None:
            last = min(last, self.start + max(1, round(CHOOSE_WITHIN * self.epochs)) - 1)
        done = min(1.0, (epoch + 1 - self.start) / (last + 1 - self.start))
        return self.costs.whole - done * (self.costs.whole - self._limit)

    def _choose(
        self, live: list[GateRecord], excess: float, scores: Mapping[str, float] | None
    ) -> None:
        """Choose blocks until a cost of `excess` is to be removed, or each stage has one left.

        The next one has the least importance per cost in the stage that kept the largest share of
        its blocks; of several such stages, in all of them. A block that saves nothing is never
        chosen.
        """
        saved = self.costs.blocks
        excess -= sum(saved[block] for block in self.chosen)
        if excess > 0 and self._harmed():
            self.held += 1
            return
        importance = {record.block: record.peak for record in live} if scores is None else scores

        free = [record.block for record in live if record.block not in self.chosen]
        whole, left = Counter(self.stages.values()), Counter(self.stages[block] for block in free)

        def cheap(block: str) -> tuple[float, float]:
            cost = 1.0 if self.criterion == "random" else saved[block] / self.costs.whole
            return cheapness(importance[block], cost)

        shares: dict[str, float] = {}  # of its stage that is left when the turn is at the block
        for block in sorted((block for block in free if saved[block]), key=cheap):
            stage = self.stages[block]
            shares[block] = left[stage] / whole[stage]
            left[stage] -= 1
        ranked = sorted(shares, key=lambda block: -shares[block])  # of equal shares the cheapest
        for block in removable(ranked, free, self.stages):
            if excess <= 0:
                return
            self.chosen |= {block}
            excess -= saved[block]

    def _harmed(self) -> bool:
        """Whether accuracy is too far below its best, in all recent epochs."""
        if self.max_accuracy_drop is None:
            return False
        lowest = max(self._accuracies) - self.max_accuracy_drop / 100
        return max(self._accuracies[-RECENT:]) < lowest

    def state_dict(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon,
            "chosen": sorted(self.chosen),
            "held": self.held,
            "accuracies": list(self._accuracies),
            "costs": asdict(self.costs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epsilon, self.held = state["epsilon"], state["held"]
        self.chosen = frozenset(state["chosen"])
        self._accuracies = list(state["accuracies"])
