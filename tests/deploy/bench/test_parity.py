"""Comparing two stages of the chain."""

from __future__ import annotations

import numpy as np
import pytest

from eps_deploy.bench import accuracy
from eps_deploy.engines.base import Images, Logits

IMAGES = np.random.default_rng(0).integers(0, 256, (33, 1, 8, 8), dtype=np.uint8)
INDICES = list(range(100, 133))
BATCHES = (1, 2, 7, 32)


def reference(images: Images) -> Logits:
    return images.reshape(len(images), -1)[:, :10].astype(np.float32)


def shifted(offset: float) -> accuracy.Infer:
    return lambda images: reference(images) + np.float32(offset)


def compare(candidate: accuracy.Infer, limit: float = 1e-4) -> accuracy.Parity:
    stages = [accuracy.passes(infer, IMAGES, BATCHES) for infer in (reference, candidate)]
    return accuracy.compare("compact-onnx", stages[0], stages[1], INDICES, limit, BATCHES)


def test_every_batch_size_sees_every_image() -> None:
    seen: list[int] = []

    def watch(images: Images) -> Logits:
        seen.append(len(images))
        return reference(images)

    accuracy.passes(watch, IMAGES, BATCHES)
    assert seen == [1] * 33 + [2] * 16 + [1] + [7] * 4 + [5] + [32, 1]


def test_equal_stages() -> None:
    found = compare(reference, limit=0.0)
    assert found.passed
    assert (found.max_abs, found.relative, found.top1_agreement) == (0.0, 0.0, 1.0)


def test_the_worst_image_is_named_by_its_index_in_the_test_part() -> None:
    def off_at_20(images: Images) -> Logits:
        logits = reference(images)
        if len(images) == 7:
            logits[(images == IMAGES[20]).all(axis=(1, 2, 3)), 3] += 400
        return logits

    found = compare(off_at_20)
    assert (found.worst_sample, found.worst_batch, found.max_abs) == (120, 7, 400)
    assert not found.passed
    assert found.top1_agreement == pytest.approx(1 - 1 / (4 * 33))


def test_the_limit_is_relative_to_the_largest_logit() -> None:
    largest = max(
        float(np.abs(logits).max()) for logits in accuracy.passes(reference, IMAGES, BATCHES)
    )
    for share, passed in ((0.9e-2, True), (1.1e-2, False)):
        assert compare(shifted(share * largest), limit=1e-2).passed is passed


def test_the_smallest_difference_fails_where_equality_is_asked() -> None:
    assert not compare(shifted(1e-4), limit=0.0).passed


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_fail(bad: float) -> None:
    def broken(images: Images) -> Logits:
        logits = reference(images)
        logits[-1, 0] = bad
        return logits

    found = compare(broken)
    assert not found.passed
    assert found.max_abs is None
    assert found.relative is None


def test_logits_of_zero_compare() -> None:
    zero = accuracy.passes(lambda images: np.zeros((len(images), 3), np.float32), IMAGES, BATCHES)
    assert accuracy.compare("compact-onnx", zero, zero, INDICES, 0.0, BATCHES).passed


@pytest.mark.parametrize("total", [1, 5, 33, 359, 10_000])
def test_samples_spread_over_the_whole_test_part(total: int) -> None:
    picked = accuracy.pick_samples(total, 33)
    assert len(picked) == 33
    assert picked.min() == 0
    assert picked.max() == total - 1
    assert len(set(picked.tolist())) == min(total, 33)
