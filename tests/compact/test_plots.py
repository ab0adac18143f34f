"""The block map: states of all blocks, and the plot: readable, and the same every time."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from eps_compact.certificate import BlockEvidence
from eps_compact.plots import COLORS, LEGEND, Block, State, block_map, draw_blocks, strip
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.plots import png
from tests.checkpoints import make_checkpoint

CYCLE: tuple[State, ...] = ("alive", "dead", "sometimes closed", "dead")


def blocks(a_stage: int, *, measured: bool = True) -> list[Block]:
    return [
        Block(
            name=f"stages.{stage}.{index}",
            stage=f"stages.{stage}",
            state=CYCLE[index % 4],
            ratio={"alive": 4.0, "dead": 0.1, "sometimes closed": 1.2}[CYCLE[index % 4]]
            if measured
            else None,
        )
        for stage in range(3)
        for index in range(a_stage)
    ]


def pixels(content: bytes) -> npt.NDArray[np.int64]:
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(np.int64)


def where(image: npt.NDArray[np.int64], state: State) -> npt.NDArray[np.bool_]:
    color = np.array([round(255 * part) for part in to_rgb(COLORS[state])])
    return np.asarray(abs(image - color).max(axis=2) <= 1)


@pytest.mark.parametrize("a_stage", [1, 9, 125])
def test_every_state_is_seen(a_stage: int) -> None:
    image = pixels(draw_blocks(blocks(a_stage), "27 → 12 blocks"))
    height, width, _ = image.shape
    assert width > 1500
    assert 0.2 < height / width < 0.5
    for state in set(CYCLE[:a_stage]):
        assert where(image, state).sum() > 500, state


def test_each_of_375_blocks_has_pixels_of_its_own() -> None:
    image = pixels(draw_blocks(blocks(125), "375 blocks"))
    row = where(image, "alive").sum(axis=1).argmax()
    alive = where(image, "alive")[row]
    runs = int((alive[1:] & ~alive[:-1]).sum())
    assert runs == 3 * 32, "every fourth of 125, in each of three stages"


@pytest.mark.parametrize(("a_stage", "numbers"), [(9, range(9)), (125, range(0, 125, 10))])
def test_blocks_can_be_told_by_their_numbers(
    a_stage: int, numbers: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = mock.Mock(wraps=png)
    monkeypatch.setattr("eps_compact.plots.png", figure)
    draw_blocks(blocks(a_stage), "title")
    axis = figure.call_args.args[0].axes[-1].xaxis
    stages = [label.get_text().partition("\n")[0] for label in axis.get_ticklabels()]
    assert stages == ["stages.0", "stages.1", "stages.2"]
    drawn = [label.get_text() for label in axis.get_ticklabels(minor=True)]
    assert drawn == 3 * [str(number) for number in numbers]


def test_dead_blocks_hang_below_the_line_and_live_ones_stand_on_it() -> None:
    image = pixels(draw_blocks(blocks(9), "title"))
    upper = image[: int(image.shape[0] * 0.7)]  # without the strip and the legend
    rows = {state: where(upper, state).sum(axis=1) > 50 for state in CYCLE}  # no mere letters
    assert np.nonzero(rows["alive"])[0].max() <= np.nonzero(rows["dead"])[0].min() + 3


def test_states_differ_in_greyscale() -> None:
    grey = [
        float(np.dot(to_rgb(color), (0.299, 0.587, 0.114))) for color in (*COLORS.values(), "white")
    ]
    ranked = sorted(grey)
    assert min(b - a for a, b in pairwise(ranked)) > 0.15


def test_without_an_epsilon_there_is_no_scale() -> None:
    plain = pixels(draw_blocks(blocks(9, measured=False), "title"))
    scaled = pixels(draw_blocks(blocks(9), "title"))
    assert plain.shape[0] < scaled.shape[0] / 2
    assert where(plain, "alive").sum() > 500


def test_a_branch_that_answers_nothing_at_all_can_be_drawn() -> None:
    silent = Block(name="stages.0.0", stage="stages.0", state="dead", ratio=0.0)
    assert where(pixels(draw_blocks([silent, *blocks(2)], "title")), "dead").any()


def test_same_blocks_same_bytes() -> None:
    assert draw_blocks(blocks(3), "title") == draw_blocks(blocks(3), "title")


# -- the map itself


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
        *("dead", "sometimes closed", "alive"),
        *("alive", "alive", "dead"),
        *("alive", "alive", "sometimes closed"),
    ]
    assert blocks[0].ratio == 1.0 / 2.5, "the response when it was pruned"
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


def test_a_removed_block_is_dead_whatever_it_was() -> None:
    checkpoint, measured = made()
    blocks = block_map(checkpoint, measured, removed=["stages.0.1", "stages.0.0"])
    assert [block.state for block in blocks[:3]] == ["dead", "dead", "alive"]
    assert blocks[1].ratio == 5.0 / 2.5
