"""Predictions over all test images, and the paired drop in accuracy."""

from __future__ import annotations

import numpy as np
import pytest

from eps_deploy.bench.accuracy import Correct, accuracy_drop, answers, passes, pick_samples
from eps_deploy.engines.base import Images, Logits


def outcomes(total: int, wrong: list[int]) -> Correct:
    right = np.ones(total, dtype=bool)
    right[wrong] = False
    return right


def test_every_batch_size_sees_every_image() -> None:
    images = np.zeros((33, 1, 8, 8), np.uint8)
    seen: list[int] = []

    def infer(batch: Images) -> Logits:
        seen.append(len(batch))
        return np.zeros((len(batch), 10), np.float32)

    assert [len(logits) for logits in passes(infer, images, (1, 2, 7, 32))] == [33] * 4
    assert seen == [1] * 33 + [2] * 16 + [1] + [7] * 4 + [5] + [32, 1]


@pytest.mark.parametrize("total", [1, 5, 33, 359, 10_000])
def test_samples_spread_over_the_whole_test_part(total: int) -> None:
    picked = pick_samples(total, 33)
    assert len(picked) == 33
    assert picked.min() == 0
    assert picked.max() == total - 1
    assert len(set(picked.tolist())) == min(total, 33)


def test_every_image_counts_once_also_in_the_last_batch() -> None:
    images = np.arange(150, dtype=np.uint8).reshape(150, 1, 1, 1)
    labels = (np.arange(150) % 3).astype(np.int64)

    def infer(batch: Images) -> Logits:
        guess = batch[:, 0, 0, 0] % 3
        guess[batch[:, 0, 0, 0] == 149] = 0  # 149 % 3 is 2
        return np.eye(3, dtype=np.float32)[guess]

    assert np.flatnonzero(~answers(infer, images, labels, 128).correct).tolist() == [149]


def test_the_drop_is_paired() -> None:
    """Two images lost, one gained, of 400: half a point less one quarter."""
    drop = accuracy_drop(outcomes(400, [0]), outcomes(400, [1, 2]), limit=0.5)
    assert (drop.only_baseline, drop.only_engine, drop.samples) == (2, 1, 400)
    assert drop.points.value == pytest.approx(0.25)
    assert drop.points.low < 0 < drop.points.value < drop.points.high


def test_images_that_both_get_wrong_do_not_count() -> None:
    both = list(range(50))
    some, none = (accuracy_drop(outcomes(400, w), outcomes(400, w), 0.5) for w in (both, []))
    assert some.points == none.points


def test_few_images_pass_without_being_conclusive() -> None:
    """With equal answers on 359 images the drop might still be 1.06 points."""
    drop = accuracy_drop(outcomes(359, []), outcomes(359, []), limit=0.5)
    assert drop.passed
    assert not drop.conclusive
    assert drop.points.high == pytest.approx(1.06, abs=0.005)


def test_many_images_are_conclusive() -> None:
    drop = accuracy_drop(outcomes(10_000, []), outcomes(10_000, []), limit=0.5)
    assert drop.passed
    assert drop.conclusive


def test_a_drop_above_the_limit_fails_even_if_it_may_be_chance() -> None:
    drop = accuracy_drop(outcomes(359, []), outcomes(359, [7, 8]), limit=0.5)
    assert drop.points.value == pytest.approx(200 / 359)
    assert not drop.passed
    assert not drop.conclusive


def test_a_large_drop_fails_for_sure() -> None:
    drop = accuracy_drop(outcomes(359, []), outcomes(359, list(range(40))), limit=0.5)
    assert not drop.passed
    assert drop.conclusive


def test_a_drop_of_exactly_the_limit_passes() -> None:
    assert accuracy_drop(outcomes(200, []), outcomes(200, [3]), limit=0.5).passed
    assert accuracy_drop(outcomes(1000, []), outcomes(1000, [1, 2, 3]), limit=0.3).passed


def test_a_better_engine_passes_a_limit_of_zero() -> None:
    assert accuracy_drop(outcomes(100, [1, 2]), outcomes(100, [1]), limit=0.0).passed
