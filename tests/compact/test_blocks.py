"""What became of every block, told from the record and the measurement."""

from __future__ import annotations

from dataclasses import replace

from eps_compact.evidence import BlockEvidence
from eps_compact.plots import LEGEND, block_map, strip
from eps_train.training.checkpoint import Checkpoint
from tests.checkpoints import make_checkpoint


def live(block: str, *, closed: float | None, peak: float = 5.0) -> BlockEvidence:
    return BlockEvidence(block=block, epsilon=2.5, peak=peak, quiet=0.0, samples=9, closed=closed)


def made() -> tuple[Checkpoint, list[BlockEvidence]]:
    checkpoint = make_checkpoint(dead=["stages.0.0", "stages.1.2"])
    closed = {"stages.0.1": 0.4, "stages.2.2": 1.0, "stages.2.0": None}
    measured = [
        live(record.block, closed=closed.get(record.block, 0.0))
        for record in checkpoint.gates
        if record.death is None
    ]
    return checkpoint, measured


def test_every_block_has_a_state_and_a_height() -> None:
    blocks = block_map(*made())
    assert [block.state for block in blocks] == [
        *("dead", "flickering", "alive"),
        *("alive", "alive", "dead"),
        *("alive", "alive", "flickering"),
    ]
    assert blocks[0].ratio == 1.0 / 2.5, "the response when it died"
    assert blocks[1].ratio == 5.0 / 2.5
    assert {block.stage for block in blocks} == {"stages.0", "stages.1", "stages.2"}


def test_strip_is_by_stage() -> None:
    assert strip(block_map(*made())) == "·▒█ ██· ██▒"
    assert all(sign in LEGEND for sign in "·▒█")


def test_a_plain_network_is_alive_without_a_height() -> None:
    blocks = block_map(make_checkpoint(gated=False), [])
    assert len(blocks) == 9
    assert {(block.state, block.ratio) for block in blocks} == {("alive", None)}


def test_a_block_without_a_gate_in_a_gated_network() -> None:
    checkpoint, measured = made()
    gates = [record for record in checkpoint.gates if record.block != "stages.1.1"]
    network = replace(checkpoint.network, gated=tuple(record.block for record in gates))
    measured = [block for block in measured if block.block != "stages.1.1"]
    blocks = block_map(replace(checkpoint, gates=gates, network=network), measured)
    assert (blocks[4].name, blocks[4].state, blocks[4].ratio) == ("stages.1.1", "alive", None)
