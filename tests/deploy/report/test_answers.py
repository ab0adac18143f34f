"""Accuracy by class and what goes with it, against scikit-learn and plain loops."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, recall_score, top_k_accuracy_score

from eps_core.stats import paired_difference
from eps_deploy.bench.accuracy import Answers, Classes, answers
from eps_deploy.engines.base import Images, Logits
from eps_deploy.report.report import (
    GALLERY,
    answers_entry,
    calibration_error,
    class_check,
    most_lost,
)
from eps_deploy.report.schema import AnswersEntry
from tests.deploy.report.reports import answered


def names(classes: int) -> list[str]:
    return [f"c{index}" for index in range(classes)]


def logits(labels: Classes, classes: int, skill: float, seed: int) -> Logits:
    """Random logits, that of the label higher by `skill`."""
    found = np.random.default_rng(seed).normal(size=(len(labels), classes))
    found[np.arange(len(labels)), labels] += skill
    return found.astype(np.float32)


def said(values: Logits, labels: Classes) -> Answers:
    """What a network with these logits answers, seven images at a time."""

    def infer(images: Images) -> Logits:
        return values[images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 0, 1]]

    index = np.arange(len(labels))
    images = np.stack([index // 256, index % 256], axis=1).astype(np.uint8)[:, None, None]
    return answers(infer, images, labels, 7)


@pytest.fixture(scope="module")
def labels() -> Classes:
    """Of 400 images: class 0 has most of them, class 4 a single one, class 11 none."""
    many = np.random.default_rng(2).choice(11, size=399, p=[0.4, 0.1, 0.1, 0.1, 0, *[0.05] * 6])
    return np.append(many, 4)


def test_answers_are_those_of_scikit_learn(labels: Classes) -> None:
    values = logits(labels, 12, 2.0, seed=0)
    found = said(values, labels)
    assert (found.classes == values.argmax(axis=1)).all()
    assert (found.correct == (found.classes == labels)).all()
    probabilities = torch.from_numpy(values).double().softmax(dim=1).numpy()
    assert found.confidence == pytest.approx(probabilities.max(axis=1))
    for count in (1, 2, 5):
        expected = top_k_accuracy_score(labels, values, k=count, labels=range(12))
        assert found.top(count).mean() == pytest.approx(expected)


def test_of_equal_logits_the_first_is_higher() -> None:
    """As in the prediction: a network whose logits are all equal has no top-5 accuracy of 1."""
    labels = np.arange(10)
    found = said(np.zeros((10, 10), np.float32), labels)
    assert found.ranks.tolist() == list(range(10))
    assert found.top(5).mean() == 0.5


def test_logits_that_are_not_finite_are_no_answer() -> None:
    values = np.zeros((3, 6), np.float32)
    values[:, 2] = 1
    values[1, 0], values[2, 2] = np.nan, np.inf
    found = said(values, np.full(3, 2))
    assert found.classes.tolist() == [2, -1, -1]
    assert found.ranks.tolist() == [0, 6, 6]
    assert found.top(5).tolist() == [True, False, False]
    assert found.confidence[1:].tolist() == [0, 0]
    entry = answers_entry(
        np.full(3, 2), names(6), said(np.eye(6, dtype=np.float32)[[2] * 3], np.full(3, 2)), found
    )
    assert entry.confusions is not None
    assert entry.changed is not None
    (pair,) = entry.confusions
    assert (pair.label, pair.predicted, pair.baseline, pair.judged) == ("c2", None, 0, 2)
    assert {changed.judged for changed in entry.changed} == {None}


@pytest.fixture(scope="module")
def both(labels: Classes) -> tuple[Answers, Answers]:
    """A better network, and a worse one."""
    better, worse = logits(labels, 12, 3.0, seed=0), logits(labels, 12, 2.0, seed=1)
    return said(better, labels), said(worse, labels)


def test_accuracy_by_class(labels: Classes, both: tuple[Answers, Answers]) -> None:
    baseline, judged = both
    found = answers_entry(labels, names(12), baseline, judged).classes
    assert [entry.samples for entry in found] == np.bincount(labels, minlength=12).tolist()
    for entry, expected in (("baseline", baseline), ("judged", judged)):
        recalls = recall_score(labels, expected.classes, labels=range(11), average=None)
        assert [getattr(each, entry) for each in found[:11]] == pytest.approx(list(recalls))
    for index, entry_ in enumerate(found[:11]):
        pairs = Counter(
            zip(
                (baseline.classes == labels)[labels == index].tolist(),
                (judged.classes == labels)[labels == index].tolist(),
                strict=True,
            )
        )
        drop = entry_.drop
        assert drop is not None
        lost, won = pairs[True, False], pairs[False, True]
        assert (drop.only_baseline_right, drop.only_engine_right) == (lost, won)
        expected_drop = paired_difference(lost, won, entry_.samples)
        assert [drop.points, drop.low, drop.high] == pytest.approx(
            [100 * expected_drop.value, 100 * expected_drop.low, 100 * expected_drop.high]
        )
        assert drop.at_least < drop.low <= drop.points


def test_a_class_without_test_images(labels: Classes, both: tuple[Answers, Answers]) -> None:
    entry = answers_entry(labels, names(12), *both)
    empty = entry.classes[11]
    assert (empty.name, empty.samples) == ("c11", 0)
    assert (empty.baseline, empty.judged, empty.drop) == (None, None, None)
    assert empty not in most_lost(entry)
    assert len(most_lost(entry)) == 11
    # It takes no part in the correction for several classes either.
    drop = entry.classes[0].drop
    assert drop is not None
    counts = (drop.only_baseline_right, drop.only_engine_right, entry.classes[0].samples)
    assert drop.at_least == 100 * paired_difference(*counts, together=11).low


def test_confusions_are_those_that_rose(labels: Classes, both: tuple[Answers, Answers]) -> None:
    before, after = (confusion_matrix(labels, a.classes, labels=range(12)) for a in both)
    expected = {
        (f"c{row}", f"c{column}", before[row, column], after[row, column])
        for row in range(12)
        for column in range(12)
        if row != column and after[row, column] > before[row, column]
    }
    found = answers_entry(labels, names(12), *both).confusions
    assert found is not None
    assert {(c.label, c.predicted, c.baseline, c.judged) for c in found} == expected
    rises = [each.judged - each.baseline for each in found]
    assert rises == sorted(rises, reverse=True)


@pytest.mark.parametrize("classes", [10, 11])
def test_top_5_is_reported_above_ten_classes(classes: int) -> None:
    labels = np.arange(300) % classes
    values = [logits(labels, classes, skill, seed) for seed, skill in enumerate((2.0, 0.5))]
    baseline, judged = (said(value, labels) for value in values)
    found = answers_entry(labels, names(classes), baseline, judged).top5
    if classes == 10:
        assert found is None
        return
    assert found is not None
    expected = [top_k_accuracy_score(labels, value, k=5) for value in values]
    assert [found.baseline, found.judged] == pytest.approx(expected)
    assert found.drop is not None
    assert found.drop.points == pytest.approx(100 * (expected[0] - expected[1]))
    assert found.drop.low < found.drop.points < found.drop.high


def test_the_calibration_error_is_that_of_a_plain_loop(
    labels: Classes, both: tuple[Answers, Answers]
) -> None:
    for found in both:
        expected = 0.0
        for low, high in pairwise(np.linspace(0, 1, 16)):
            inside = (found.confidence > low) & (found.confidence <= high)
            if inside.any():
                gap = found.correct[inside].mean() - found.confidence[inside].mean()
                expected += inside.mean() * abs(gap)
        assert calibration_error(found.correct, found.confidence) == pytest.approx(expected)
    entry = answers_entry(labels, names(12), *both).confidence
    assert entry.baseline is not None
    for told, found in zip((entry.baseline, entry.judged), both, strict=True):
        assert told.ece == calibration_error(found.correct, found.confidence)
        assert told.mean == found.confidence.mean()


def test_a_network_as_sure_as_it_is_right_is_calibrated() -> None:
    correct = np.arange(100) < 80
    assert calibration_error(correct, np.full(100, 0.8)) == pytest.approx(0)
    assert calibration_error(correct, np.full(100, 1.0)) == pytest.approx(0.2)


def test_changed_answers_are_all_images_with_another_class(
    labels: Classes, both: tuple[Answers, Answers]
) -> None:
    baseline, judged = both
    found = answers_entry(labels, names(12), baseline, judged).changed
    assert found is not None
    different = np.flatnonzero(baseline.classes != judged.classes)
    assert sorted(entry.index for entry in found) == different.tolist()
    kinds = []
    for entry in found:
        at = entry.index
        assert entry.label == f"c{labels[at]}"
        assert entry.baseline == f"c{baseline.classes[at]}"
        assert entry.judged == f"c{judged.classes[at]}"
        assert entry.judged_confidence == judged.confidence[at]
        kinds.append(0 if baseline.correct[at] else 1 if judged.correct[at] else 2)
    assert kinds == sorted(kinds)
    assert set(kinds) == {0, 1, 2}
    shown = Counter(kind for kind, entry in zip(kinds, found, strict=True) if entry.image)
    assert shown == {kind: min(count, GALLERY) for kind, count in Counter(kinds).items()}
    # Class 0, with most of the images, does not fill the gallery.
    lost = [entry for kind, entry in zip(kinds, found, strict=True) if kind == 0]
    first = [entry.label for entry in lost[: len({entry.label for entry in lost})]]
    assert len(first) == len(set(first)) > 5


def test_without_a_baseline_there_is_nothing_to_compare_with(labels: Classes) -> None:
    judged = said(logits(labels, 12, 2.0, seed=0), labels)
    entry = answers_entry(labels, names(12), None, judged)
    assert entry.classes[0].judged == judged.correct[labels == 0].mean()
    assert {(c.baseline, c.drop) for c in entry.classes} == {(None, None)}
    assert (entry.confusions, entry.changed, entry.confidence.baseline) == (None, None, None)
    assert entry.top5 is not None
    assert (entry.top5.baseline, entry.top5.drop) == (None, None)


# -- The check


def lost(samples: int, lost: dict[int, int], classes: int = 10) -> AnswersEntry:
    """A baseline that is always right, and so many images of each class lost."""
    labels = np.repeat(np.arange(classes), samples)
    place = np.tile(np.arange(samples), classes)
    right = place >= np.array([lost.get(int(label), 0) for label in labels])
    everything = answered(labels, np.ones(len(labels), dtype=bool), classes)
    return answers_entry(labels, names(classes), everything, answered(labels, right, classes))


def test_a_class_that_lost_too_much_fails_and_is_named() -> None:
    check = class_check(lost(100, {3: 40, 7: 1}), 10.0)
    assert (check.name, check.passed, check.conclusive) == ("class-accuracy", False, True)
    assert check.limit == 10
    assert check.value is not None
    assert 10 < check.value < 40
    assert check.detail.startswith("class c3: drop +40.00 points on 100 images, at least +2")
    assert "class c7" not in check.detail
    many = class_check(lost(100, dict.fromkeys(range(5), 90)), 10.0)
    assert many.detail.count(": drop ") == 3
    assert "; 2 more classes (95 % for all classes at once), limit 10" in many.detail


def test_the_interval_is_judged_and_not_the_measured_drop() -> None:
    """Twelve points lost of 25 images: as many as chance takes of ten classes."""
    check = class_check(lost(25, {3: 3}), 10.0)
    assert check.passed
    assert check.value is not None
    assert check.value < 10
    assert not check.conclusive
    assert "class c3: drop +12.00 points on 25 images" in check.detail
    assert check.detail.endswith("too few images to tell for 10 of 10 classes")


def test_a_class_of_one_image_is_no_alarm_and_does_not_lead() -> None:
    labels = np.append(np.repeat(np.arange(10), 500), 10)
    right = np.ones(len(labels), dtype=bool)
    right[[*range(60), -1]] = False
    entry = answers_entry(
        labels,
        names(11),
        answered(labels, np.ones(len(labels), dtype=bool), 11),
        answered(labels, right, 11),
    )
    assert entry.classes[10].drop is not None
    assert entry.classes[10].drop.points == 100
    assert most_lost(entry)[0].name == "c0"
    assert class_check(entry, 15.0).passed
    assert not class_check(entry, 5.0).passed


def test_enough_images_are_conclusive() -> None:
    check = class_check(lost(1000, {3: 3}), 5.0)
    assert check.passed
    assert check.conclusive
    assert "too few" not in check.detail


def test_a_thousand_classes_of_ten_images_give_no_false_alarm() -> None:
    """Each network is wrong on other images, one in five: some class always loses half."""
    labels = np.repeat(np.arange(1000), 10)
    rng = np.random.default_rng(5)
    two = [answered(labels, rng.random(len(labels)) > 0.2, 1000) for _ in range(2)]
    entry = answers_entry(labels, names(1000), *two)
    drops = [found.drop.points for found in entry.classes if found.drop]
    assert max(drops) >= 50
    assert class_check(entry, 5.0).passed


@pytest.mark.parametrize("limit", [0.0, 0.1])
@pytest.mark.parametrize("classes", [1, 10, 100])
@pytest.mark.parametrize("samples", [1, 4, 20])
def test_a_false_alarm_is_unlikely(samples: int, classes: int, limit: float) -> None:
    """Exact, by all outcomes of a class that lost just `limit`, whatever else it got wrong."""
    alarms = [
        (b, c)
        for b in range(samples + 1)
        for c in range(samples + 1 - b)
        if paired_difference(b, c, samples, together=classes).low > limit + 1e-11
    ]
    worst = 0.0
    for only_second in np.linspace(0, (1 - limit) / 2, 21):
        shares = (only_second + limit, only_second, max(0.0, 1 - limit - 2 * only_second))
        chance = 0.0
        for b, c in alarms:
            a = samples - b - c
            ways = math.comb(samples, b) * math.comb(samples - b, c)
            chance += ways * shares[0] ** b * shares[1] ** c * shares[2] ** a
        worst = max(worst, chance)
    assert classes * worst <= (0.04 if classes >= 10 else 0.07)


def test_the_correction_is_that_of_bonferroni() -> None:
    """Without discordant pairs the ends are ±z²/(n + z²)."""
    for classes, z in ((1, 1.959964), (10, 2.807034), (1000, 4.055627)):
        found = paired_difference(0, 0, 50, together=classes)
        assert found.high == pytest.approx(z**2 / (50 + z**2), rel=1e-5)
        assert found.low == pytest.approx(-found.high)
