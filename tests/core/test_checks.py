"""Comparing the logits of two networks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from eps_core.checks import Check, Parity, Verification, compare_logits

BATCHES = (1, 2, 7, 32)
INDICES = list(range(100, 133))
LOGITS = np.random.default_rng(0).integers(0, 256, (33, 10)).astype(np.float32)

Logits = npt.NDArray[np.float32]


def compare(candidate: list[Logits], limit: float | None = 1e-4) -> Parity:
    return compare_logits(
        "compact-onnx",
        [LOGITS] * len(BATCHES),
        candidate,
        batches=BATCHES,
        limit=limit,
        indices=INDICES,
    )


def shifted(offset: float) -> list[Logits]:
    return [LOGITS + np.float32(offset)] * len(BATCHES)


def test_equal_logits() -> None:
    found = compare([LOGITS] * len(BATCHES), limit=0.0)
    assert found.passed
    assert (found.samples, found.batches, found.inputs) == (33, BATCHES, "test images")
    assert (found.max_abs, found.relative, found.top1_agreement) == (0.0, 0.0, 1.0)


def test_the_worst_image_is_named_by_its_index() -> None:
    candidate = [LOGITS.copy() for _ in BATCHES]
    candidate[BATCHES.index(7)][20, 3] += 400
    found = compare(candidate)
    assert (found.worst_sample, found.worst_batch, found.max_abs) == (120, 7, 400)
    assert not found.passed
    assert found.top1_agreement == pytest.approx(1 - 1 / (4 * 33))
    alone = compare_logits("folding", [LOGITS], [candidate[2]], batches=[7], limit=0.0)
    assert (alone.worst_sample, alone.worst_batch) == (20, 7)


def test_the_limit_is_relative_to_the_largest_logit() -> None:
    largest = float(LOGITS.max())
    for share, passed in ((0.9e-2, True), (1.1e-2, False)):
        assert compare(shifted(share * largest), limit=1e-2).passed is passed


def test_the_smallest_difference_fails_where_equality_is_demanded() -> None:
    candidate = [LOGITS.copy() for _ in BATCHES]
    candidate[0][5, 5] = np.nextafter(candidate[0][5, 5], np.float32(np.inf))
    found = compare(candidate, limit=0.0)
    assert found.passed is False
    assert found.max_abs is not None
    assert 0 < found.max_abs < 1e-4


def test_without_a_limit_nothing_is_judged() -> None:
    assert compare(shifted(1e-4), limit=None).passed is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("both", [False, True])
def test_logits_that_are_not_finite_fail(bad: float, both: bool) -> None:
    broken = LOGITS.copy()
    broken[-1, 0] = bad
    reference = broken if both else LOGITS
    found = compare_logits("compact-onnx", [reference], [broken], batches=[1], limit=1e-4)
    assert found.passed is False
    assert found.max_abs is None
    assert found.relative is None


def test_logits_of_zero_compare() -> None:
    zero = [np.zeros((33, 3), np.float32)]
    assert compare_logits("compact-onnx", zero, zero, batches=[1], limit=0.0).passed


def test_a_verification_passes_unless_a_check_fails() -> None:
    good, unknown, bad = (Check("files", passed, "") for passed in (True, None, False))
    assert Verification(lossless=True, checks=[good, unknown]).passed
    assert not Verification(lossless=True, checks=[good, bad]).passed
