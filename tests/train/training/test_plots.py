from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from eps_train.training.plots import _lr, draw


def line(epoch: int, gates: dict[str, int], died: tuple[str, ...] = ()) -> dict[str, Any]:
    """An epoch in which each named gate was closed on so many of 10 steps."""
    return {
        "epoch": epoch,
        "rate": 0.1 / epoch,
        "epsilon": 2.5,
        "loss": 1.0 / epoch,
        "train_accuracy": 0.5,
        "validation": {"accuracy": 0.6, "loss": 0.8, "samples": 100},
        "died": list(died),
        "dead": 3 - len(gates) + len(died),
        "parameters": {"total": 100, "kept": 100},
        "gates": {name: {"steps": 10, "closed": closed} for name, closed in gates.items()},
    }


def pixels(png: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def share(image: npt.NDArray[np.uint8], color: tuple[int, int, int]) -> float:
    return float((image == np.array(color, dtype=np.uint8)).all(axis=2).mean())


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
    # Three of the twelve cells of the map, which is a good quarter of the image.
    assert share(after, GREY) > 0.25 / 4
    assert share(after, DARK) < share(before, DARK)


@pytest.mark.parametrize("epochs", [1, 5])
def test_a_plain_run_has_no_map(epochs: int) -> None:
    image = pixels(draw([line(epoch, {}) for epoch in range(1, epochs + 1)], "plain"))
    gated = pixels(draw([line(epoch, {"s.0": 0}) for epoch in range(1, epochs + 1)], "gated"))
    assert image.shape[0] < gated.shape[0]


def test_the_path_of_an_epsilon_that_is_led_has_a_row_of_its_own() -> None:
    fixed = [line(epoch, {"s.0": 0}) for epoch in (1, 2, 3)]
    led = [{**made, "epsilon": 0.5 * made["epoch"]} for made in fixed]
    assert pixels(draw(led, "led")).shape[0] > pixels(draw(fixed, "fixed")).shape[0]


def test_a_plot_of_375_blocks_gives_each_a_row_of_pixels() -> None:
    names = [f"{stage}.{n}" for stage in "stu" for n in range(125)]
    closed = [
        line(epoch, dict.fromkeys(names, 0) | dict.fromkeys(names[::2], 10)) for epoch in (1, 2)
    ]
    image = pixels(draw(closed, "deep"))
    column = image[:, image.shape[1] // 2]
    dark = (column == np.array(DARK, dtype=np.uint8)).all(axis=1)
    assert (dark[1:] & ~dark[:-1]).sum() >= 375 // 2


def test_a_log_of_an_older_version_can_be_drawn() -> None:
    made = [line(epoch, {"s.0": 0}) for epoch in (1, 2)]
    for epoch in made:
        del epoch["parameters"]
    assert draw(made, "old")


@pytest.mark.parametrize(("lrs", "scale"), [([0.1, 0.1, 0.01], "log"), (range(1, 9), "linear")])
def test_a_cosine_is_drawn_on_a_linear_axis(lrs: Sequence[float], scale: str) -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    _lr(axis, [line(epoch, {}) | {"rate": lr} for epoch, lr in enumerate(lrs, 1)])
    assert axis.get_yscale() == scale


def test_a_rate_of_zero_can_be_drawn() -> None:
    assert draw([{**line(epoch, {"s.0": 0}), "rate": 0.0} for epoch in (1, 2)], "zero")
