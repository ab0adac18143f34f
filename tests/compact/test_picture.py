"""The block map as a picture: there, readable, and the same every time."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from eps_compact.plots import COLORS, Block, State, draw_blocks, save
from eps_core.errors import ConfigError

CYCLE: tuple[State, ...] = ("alive", "dead", "flickering", "dead")


def blocks(a_stage: int, *, measured: bool = True) -> list[Block]:
    return [
        Block(
            name=f"stages.{stage}.{index}",
            stage=f"stages.{stage}",
            state=CYCLE[index % 4],
            ratio={"alive": 4.0, "dead": 0.1, "flickering": 1.2}[CYCLE[index % 4]]
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


def where(picture: npt.NDArray[np.int64], state: State) -> npt.NDArray[np.bool_]:
    color = np.array([round(255 * part) for part in to_rgb(COLORS[state])])
    return np.asarray(abs(picture - color).max(axis=2) <= 1)


@pytest.mark.parametrize("a_stage", [1, 9, 125])
def test_every_state_is_seen(a_stage: int) -> None:
    picture = pixels(draw_blocks(blocks(a_stage), "27 → 12 blocks"))
    height, width, _ = picture.shape
    assert width > 1500
    assert 0.2 < height / width < 0.5
    for state in set(CYCLE[:a_stage]):
        assert where(picture, state).sum() > 500, state


def test_each_of_375_blocks_has_pixels_of_its_own() -> None:
    picture = pixels(draw_blocks(blocks(125), "375 blocks"))
    row = where(picture, "alive").sum(axis=1).argmax()
    alive = where(picture, "alive")[row]
    runs = int((alive[1:] & ~alive[:-1]).sum())
    assert runs == 3 * 32, "every fourth of 125, in each of three stages"


@pytest.mark.parametrize(("a_stage", "numbers"), [(9, range(9)), (125, range(0, 125, 10))])
def test_blocks_can_be_told_by_their_numbers(a_stage: int, numbers: range) -> None:
    drawn = re.findall(r"<!-- (.*?) -->", draw_blocks(blocks(a_stage), "title", "svg").decode())
    for stage in range(3):
        assert f"stages.{stage}" in drawn
    for number in numbers:
        # Those of the axis may be among them.
        assert drawn.count(str(number)) >= 3, number
    assert drawn.count("1" if a_stage > 9 else "9") < 3


def test_dead_blocks_hang_below_the_line_and_live_ones_stand_on_it() -> None:
    picture = pixels(draw_blocks(blocks(9), "title"))
    upper = picture[: int(picture.shape[0] * 0.7)]  # without the strip and the legend
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
    for format in ("png", "svg"):
        assert draw_blocks(blocks(3), "title", format) == draw_blocks(blocks(3), "title", format)


@pytest.mark.parametrize(
    ("name", "start"), [("map.png", b"\x89PNG"), ("map.SVG", b"<?xml"), ("map.pdf", b"%PDF")]
)
def test_the_ending_picks_the_format(name: str, start: bytes, tmp_path: Path) -> None:
    save(tmp_path / name, blocks(2), "title")
    assert (tmp_path / name).read_bytes().startswith(start)


def test_unknown_endings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"map\.txt: not a picture's name; end it in \.png"):
        save(tmp_path / "map.txt", blocks(2), "title")
    assert not list(tmp_path.iterdir())
