"""The block map: every residual block of the network as it was built, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from eps_compact.liveness import Liveness
from eps_train import graph
from eps_train.checkpoint import Checkpoint

State = Literal["alive", "flickering", "dead"]
# The signs of the training progress.
SYMBOLS: dict[State, str] = {"alive": "█", "flickering": "▒", "dead": "·"}
LEGEND = "  ".join(f"{symbol} {state}" for state, symbol in SYMBOLS.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One block of the map.

    Attributes:
        name, stage: its name and the group it belongs to.
        state: `dead`: removed; `flickering`: live, but its gate was closed on steps of the last
            epoch; `alive`: on none of them, or it has no gate.
        ratio: largest response on held-out images in units of epsilon, for a dead block when it
            died; None without an epsilon.
    """

    name: str
    stage: str
    state: State
    ratio: float | None


def block_map(checkpoint: Checkpoint, live: Iterable[Liveness]) -> tuple[Block, ...]:
    """All blocks, in the order of computation; `live` as `liveness.liveness` measured them."""
    measured = {block.block: block for block in live}
    deaths = {record.block: record.death for record in checkpoint.gates}
    blocks = []
    for name in checkpoint.network.all_blocks():
        state: State = "alive"
        ratio = None
        if death := deaths.get(name):
            state, ratio = "dead", death.heldout_peak / death.epsilon
        elif name in measured:
            ratio = measured[name].ratio
            state = "flickering" if measured[name].closed else "alive"
        blocks.append(Block(name=name, stage=graph.stage_name(name), state=state, ratio=ratio))
    return tuple(blocks)


def stages(blocks: Iterable[Block]) -> list[tuple[str, list[Block]]]:
    """The blocks by stage, in the order of computation."""
    return [(stage, list(members)) for stage, members in groupby(blocks, lambda b: b.stage)]


def strip(blocks: Iterable[Block]) -> str:
    """The map as text: one character a block, a space between stages; see `LEGEND`."""
    return " ".join(
        "".join(SYMBOLS[block.state] for block in members) for _, members in stages(blocks)
    )
