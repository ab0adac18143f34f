"""Find the blocks to keep in higher precision so that a reduced network is accurate enough.

The search only uses trials: keep some blocks, check whether the limit holds. It tries halves before
single blocks, so that finding a few harmful blocks among hundreds takes a few dozen trials
(QuickXplain: Junker, AAAI 2004).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache

import onnx

from eps_deploy.export.types import layer_types
from eps_deploy.precision import belongs


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Outcome of keeping some blocks.

    `value` is the limited value, lower is better, such as the drop in accuracy in points; `passed`
    is whether the limit holds.
    """

    passed: bool
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """Result of the search.

    `kept` are the blocks to keep in higher precision, in the order of computation; without any one
    of them the limit does not hold. () if nothing has to be kept, or nothing helps.
    """

    kept: tuple[str, ...]
    before: Trial  # with no block kept
    after: Trial  # with `kept`; where the limit fails even with all blocks kept, with all
    trials: int


def units(model: bytes, blocks: Collection[str]) -> tuple[str, ...]:
    """Names of what can be kept of a network from `export_onnx`, in the order of computation.

    These are those of `blocks` that it has, and each layer outside of them (stem, classifier).
    """
    found: dict[str, None] = {}
    for layer in layer_types(onnx.load_from_string(model)):
        holders = [block for block in blocks if belongs(layer, [block])]
        found[max(holders, key=len, default=layer)] = None
    return tuple(found)


def repair(candidates: Sequence[str], attempt: Callable[[tuple[str, ...]], Trial]) -> Repair:
    """Find a set of blocks that makes the limit hold and of which none can be left out.

    Args:
        candidates: what may be kept, in the order of computation; see :func:`units`.
        attempt: builds the network with these kept (in the order of `candidates`) and measures it.
            It is called once for each set.
    """
    tried = cache(attempt)

    def keeping(kept: Collection[str]) -> Trial:
        return tried(tuple(name for name in candidates if name in kept))

    def needed(kept: Sequence[str], choice: Sequence[str]) -> Sequence[str]:
        """Which of `choice` to keep besides `kept`; keeping all of them is known to pass."""
        if keeping(kept).passed:
            return ()
        if len(choice) == 1:
            return choice

        def rank(half: Sequence[str]) -> tuple[bool, float]:
            trial = keeping((*kept, *half))
            return not trial.passed, trial.value

        # If either half would do, the one that improves more has the worst block.
        middle = len(choice) // 2
        better, other = sorted((choice[:middle], choice[middle:]), key=rank)
        if keeping((*kept, *better)).passed:
            return needed(kept, better)
        found = needed((*kept, *other), better)
        return (*found, *needed((*kept, *found), other))

    before = after = keeping(())
    kept: tuple[str, ...] = ()
    if not before.passed:
        after = keeping(candidates)
        if after.passed:
            found = needed((), candidates)
            kept = tuple(name for name in candidates if name in found)
            after = tried(kept)
    return Repair(kept=kept, before=before, after=after, trials=tried.cache_info().misses)
