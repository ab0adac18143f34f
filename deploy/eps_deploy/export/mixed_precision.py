"""Which blocks to keep in higher precision so that a reduced network is accurate enough again.

Found by trials alone: keep some blocks, look whether the limit holds. Halves are tried before
single blocks, so that a few bad ones among hundreds take a few dozen trials (QuickXplain: Junker,
AAAI 2004).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import onnx

from eps_deploy.export.types import belongs, layer_types


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What came of keeping some blocks.

    Attributes:
        passed: whether the limit holds.
        value: what is limited, the smaller the better, such as the drop in accuracy in points.
    """

    passed: bool
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """What was found.

    Attributes:
        kept: the blocks that stay in higher precision, in the order of computation. Without any of
            them the limit does not hold. () when nothing has to be kept, or nothing helps.
        before, after: with no block kept, and with these. `after` has not passed when the limit
            does not hold even with every block kept: then it is that trial's.
        trials: how many were made.
    """

    kept: tuple[str, ...]
    before: Trial
    after: Trial
    trials: int


def units(model: bytes, blocks: Collection[str]) -> tuple[str, ...]:
    """What can be kept of an ONNX network as `export_onnx` wrote it, in the order of computation.

    Those of `blocks` that it has, and every layer outside of them (the stem, the classifier).
    """
    found: dict[str, None] = {}
    for layer in layer_types(onnx.load_from_string(model)):
        mine = [block for block in blocks if belongs(layer, [block])]
        found[max(mine, key=len, default=layer)] = None
    return tuple(found)


def repair(candidates: Sequence[str], attempt: Callable[[tuple[str, ...]], Trial]) -> Repair:
    """Find blocks to keep, so that the limit holds and none of them is kept in vain.

    Args:
        candidates: what may be kept, in the order of computation: see :func:`units`.
        attempt: builds the network with these kept (in the order of `candidates`) and measures it;
            with all of them kept nothing is reduced any more, which `quantize` refuses to do.
    """
    search = _Search(candidates, attempt)
    before = search.keeping(())
    if before.passed:
        return Repair(kept=(), before=before, after=before, trials=search.trials)
    whole = search.keeping(candidates)
    if not whole.passed:
        return Repair(kept=(), before=before, after=whole, trials=search.trials)
    kept = search.needed((), candidates)
    return Repair(
        kept=search.ordered(kept),
        before=before,
        after=search.keeping(kept),
        trials=search.trials,
    )


class _Search:
    def __init__(
        self, candidates: Sequence[str], attempt: Callable[[tuple[str, ...]], Trial]
    ) -> None:
        self._candidates = candidates
        self._attempt = attempt
        self._known: dict[tuple[str, ...], Trial] = {}

    @property
    def trials(self) -> int:
        return len(self._known)

    def ordered(self, kept: Collection[str]) -> tuple[str, ...]:
        return tuple(name for name in self._candidates if name in kept)

    def keeping(self, kept: Collection[str]) -> Trial:
        names = self.ordered(kept)
        if names not in self._known:
            self._known[names] = self._attempt(names)
        return self._known[names]

    def needed(self, kept: Sequence[str], choice: Sequence[str]) -> Sequence[str]:
        """Which of `choice` to keep besides `kept`; keeping all of them is known to pass."""
        if self.keeping(kept).passed:
            return ()
        if len(choice) == 1:
            return choice
        middle = len(choice) // 2
        halves = (choice[:middle], choice[middle:])
        # The half that heals more, where either would do: there is the worst block.
        better, other = sorted(halves, key=lambda half: self._rank((*kept, *half)))
        if self.keeping((*kept, *better)).passed:
            return self.needed(kept, better)
        found = self.needed((*kept, *other), better)
        return (*found, *self.needed((*kept, *found), other))

    def _rank(self, kept: Sequence[str]) -> tuple[bool, float]:
        trial = self.keeping(kept)
        return not trial.passed, trial.value
