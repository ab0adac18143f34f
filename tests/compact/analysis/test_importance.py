"""Block importance: its figures against plain recomputation, its samples, and what it refuses."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from eps_compact.analysis.importance import (
    Importance,
    evaluation_samples,
    measure_importance,
    points,
    scaled,
    table,
)
from eps_compact.certificate import BlockEvidence, as_json
from eps_compact.compaction import compact
from eps_core.errors import ConfigError
from eps_core.stats import Interval
from eps_train.data import dataset
from eps_train.data.images import ImageSet
from eps_train.models.resnets import Normalize
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import score
from tests.checkpoints import EPSILON, make_checkpoint
from tests.train.gating.timers import LayerTimer

DEAD = ("stages.1.1", "stages.2.2")
DIGITS = dataset.load("digits")


def normalize(checkpoint: Checkpoint) -> Normalize:
    return Normalize.of(checkpoint.data)


def test_every_live_block_is_measured_on_all_images_when_there_are_no_more() -> None:
    checkpoint = make_checkpoint(dead=DEAD)
    found = measure_importance(checkpoint, DIGITS.validation, timer=LayerTimer(), samples=500)
    assert [e.block for e in found.entries] == [
        block for block in checkpoint.network.gated if block not in DEAD
    ]
    assert found.samples == found.available == len(DIGITS.validation)
    gated = checkpoint.build_gated().eval()
    whole = score(gated, normalize(checkpoint), DIGITS.validation)
    assert found.accuracy == pytest.approx(whole.accuracy)
    assert found.loss == pytest.approx(whole.loss, rel=1e-5)
    for entry in found.entries[::3]:
        less = compact(gated, dead=[entry.block])
        alone = score(less, normalize(checkpoint), DIGITS.validation)
        assert entry.drop.value == pytest.approx(100 * (whole.accuracy - alone.accuracy))
        assert entry.loss.value == pytest.approx(alone.loss - whole.loss, abs=1e-5)
        assert entry.drop.low <= entry.drop.value <= entry.drop.high
        assert entry.loss.low <= entry.loss.value <= entry.loss.high


def test_the_gates_record_is_that_of_the_last_epoch() -> None:
    checkpoint = make_checkpoint()
    live = BlockEvidence(
        block="stages.0.1", epsilon=EPSILON, peak=5.0, quiet=0.1, samples=9, closed=0.2
    )
    found = measure_importance(
        checkpoint, DIGITS.validation, live=[live], timer=LayerTimer(), samples=1000
    )
    entry = found.entries[1]
    assert (entry.steps, entry.closed_steps, entry.closed, entry.peak) == (20, 3, 0.15, 7.5)
    assert entry.ratio == 5.0 / EPSILON
    assert found.entries[0].ratio is None


def test_a_network_without_gates_can_be_measured_too() -> None:
    plain = make_checkpoint(gated=False)
    found = measure_importance(plain, DIGITS.validation, timer=LayerTimer(), samples=500)
    assert [e.block for e in found.entries] == list(plain.network.all_blocks())
    assert all(e.closed is None and e.steps is None for e in found.entries)
    assert "stages.0.0" in text_of(found)


def test_a_number_of_samples_is_used_and_no_more() -> None:
    """The same ones every time: two measurements differ in their times alone."""
    checkpoint = make_checkpoint()
    first, second = (
        measure_importance(checkpoint, DIGITS.validation, timer=LayerTimer(), samples=40)
        for _ in range(2)
    )
    assert (first.samples, first.available) == (40, len(DIGITS.validation))
    assert replace(first, seconds=0) == replace(second, seconds=0)
    chosen = evaluation_samples(DIGITS.validation, 40)
    whole = score(checkpoint.build_gated().eval(), normalize(checkpoint), chosen)
    assert first.accuracy == pytest.approx(whole.accuracy)


def test_nothing_left_to_measure_is_refused() -> None:
    every = make_checkpoint().network.gated
    with pytest.raises(ConfigError, match="every block is dead"):
        measure_importance(
            make_checkpoint(dead=every), DIGITS.validation, timer=LayerTimer(), samples=9
        )


def test_the_samples_are_random_and_always_the_same() -> None:
    """The first of them are to stand for all, also where a folder has them class by class."""
    part = ImageSet(torch.zeros(100, 1, 8, 8, dtype=torch.uint8), torch.arange(100) // 10)
    first = evaluation_samples(part, 1000).labels
    assert torch.equal(first, evaluation_samples(part, 1000).labels)
    assert torch.equal(first.sort().values, part.labels)
    assert len(first[:30].unique()) > 5
    assert torch.equal(evaluation_samples(part, 30).labels, first[:30])


def text_of(found: Importance) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(table(found))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_as_data_and_as_a_table() -> None:
    """A block that breaks the network counts as the worst there is; the data stay JSON."""
    checkpoint = make_checkpoint(dead=DEAD)
    checkpoint.state["stages.2.0.conv2.weight"][0, 0, 0, 0] = math.nan
    found = measure_importance(checkpoint, DIGITS.validation, timer=LayerTimer(), samples=500)
    plain = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert plain["samples"] == 143
    assert plain["entries"][0]["ms"] == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert plain["timer"] == LayerTimer.name
    text = text_of(found)
    assert "143 of 143 held-out images" in text
    assert text.count("stages.") == len(found.entries)


def test_of_many_blocks_the_table_has_the_least_important() -> None:
    found = measure_importance(
        make_checkpoint(), DIGITS.validation, timer=LayerTimer(), samples=500
    )
    loss = Interval(0.0, 0.0, 0.0)
    entry = found.entries[0]
    many = tuple(
        replace(entry, block=f"block{i}", loss=replace(loss, value=float(i % 50)))
        for i in range(100)
    )
    text = text_of(replace(found, entries=many))
    assert "the 40 least important of 100 blocks" in text.replace("\n", " ")
    assert "block0 " in text
    assert "block49 " not in text


def test_how_figures_are_written() -> None:
    assert points(Interval(1.25, -0.5, 3.0)) == "+1.2 (-0.5..+3.0)"
    assert [scaled(n) for n in (0, 999, 1234, 45_600_000, 2e9)] == [
        "0 ", "999 ", "1.23 k", "45.6 M", "2 G",
    ]  # fmt: skip
