from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from eps_train.picture import draw


def line(epoch: int, gates: dict[str, int], died: tuple[str, ...] = ()) -> dict[str, Any]:
    """An epoch in which each named gate was closed on so many of 10 steps."""
    return {
        "epoch": epoch,
        "rate": 0.1 / epoch,
        "loss": 1.0 / epoch,
        "train_accuracy": 0.5,
        "validation": {"accuracy": 0.6, "loss": 0.8, "samples": 100},
        "died": list(died),
        "gates": {name: {"steps": 10, "closed": closed} for name, closed in gates.items()},
    }


def pixels(png: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def share(picture: npt.NDArray[np.uint8], color: tuple[int, int, int]) -> float:
    return float((picture == np.array(color, dtype=np.uint8)).all(axis=2).mean())


DARK, GREY = (0x0B, 0x3C, 0x6F), (0xD0, 0xD0, 0xD0)


def test_a_block_turns_grey_when_it_dies() -> None:
    alive = [line(epoch, {"s.0": 0, "s.1": 0, "t.0": 0}) for epoch in (1, 2, 3, 4)]
    dying = [
        line(1, {"s.0": 0, "s.1": 0, "t.0": 0}),
        line(2, {"s.0": 0, "s.1": 0, "t.0": 0}, died=("t.0",)),
        line(3, {"s.0": 0, "s.1": 0}),
        line(4, {"s.0": 0, "s.1": 0}),
    ]
    before, after = pixels(draw(alive, "run")), pixels(draw(dying, "run"))
    assert share(before, GREY) < 0.001
    # Three of the twelve cells of the map, which is a good quarter of the picture.
    assert share(after, GREY) > 0.25 / 4
    assert share(after, DARK) < share(before, DARK)


@pytest.mark.parametrize("epochs", [1, 5])
def test_a_plain_run_has_no_map(epochs: int) -> None:
    picture = pixels(draw([line(epoch, {}) for epoch in range(1, epochs + 1)], "plain"))
    gated = pixels(draw([line(epoch, {"s.0": 0}) for epoch in range(1, epochs + 1)], "gated"))
    assert picture.shape[0] < gated.shape[0]
