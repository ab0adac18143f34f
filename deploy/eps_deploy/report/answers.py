"""What a pruned network forgets: accuracy by class, confusions, calibration, changed answers.

Pruning harms some classes far more than the mean accuracy shows (Hooker et al., "What Do Compressed
Deep Neural Networks Forget?", arXiv 1911.05248).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from eps_core.checks import Check
from eps_core.stats import paired_counts, paired_difference
from eps_deploy.bench.accuracy import Answers, Classes, Correct
from eps_deploy.report.schema import (
    AnswersEntry,
    ChangedEntry,
    ClassDropEntry,
    ClassEntry,
    ConfidenceEntry,
    ConfidencesEntry,
    ConfusionEntry,
    PairedEntry,
    TopFiveEntry,
)

TOP5_ABOVE = 10  # classes; among ten, half of all guesses are in the top five
GALLERY = 24  # images of each kind of change, at most
_BINS = 15  # of the calibration error, as in Guo et al., arXiv 1706.04599


def answers_entry(
    labels: Classes, names: Sequence[str], baseline: Answers | None, judged: Answers
) -> AnswersEntry:
    """Compare two networks on the same images, class by class.

    Args:
        labels: classes of the images, int64 `[N]`.
        names: of all classes.
        baseline: the trained baseline; None without one.
        judged: the deployed network.
    """
    return AnswersEntry(
        classes=_by_class(labels, names, baseline, judged),
        top5=_top5(baseline, judged) if len(names) > TOP5_ABOVE else None,
        confidence=ConfidencesEntry(
            baseline=None if baseline is None else _confidence(baseline),
            judged=_confidence(judged),
        ),
        confusions=None if baseline is None else _confusions(labels, names, baseline, judged),
        changed=None if baseline is None else _changed(labels, names, baseline, judged),
    )


def most_lost(answers: AnswersEntry) -> list[ClassEntry]:
    """The classes that can be compared, by the lower end of the drop's interval.

    By the measured drop, a class with one or two images would often come first by chance.
    """
    compared = [(found.drop.low, found) for found in answers.classes if found.drop]
    return [found for _, found in sorted(compared, key=lambda pair: -pair[0])]


def over_limit(answers: AnswersEntry, limit: float) -> list[ClassEntry]:
    """The classes that lost significantly more than `limit` points."""
    return [c for c in most_lost(answers) if c.drop and c.drop.at_least > limit + 1e-9]


def class_check(answers: AnswersEntry, limit: float) -> Check:
    """What each class lost against the trained baseline, in percentage points.

    A class with few images loses many points by chance, and of many classes one always does. So the
    check judges the lower ends of intervals that hold for all classes at once (Bonferroni), not the
    measured drops. If every class had lost exactly `limit` points, the probability that any fails
    would be at most 4 % with ten classes or more, and 7 % with fewer: exact, for 1 to 60 images a
    class and limits of 0 to 20 points, whatever else the networks get wrong.
    """
    compared = most_lost(answers)
    failed = over_limit(answers, limit)
    # Each class by itself: that every one of them is within the limit needs no correction.
    unsure = sum(found.drop.high > limit for found in compared if found.drop)
    shown = failed[:3] or compared[:1]
    parts = [
        f"class {found.name}: drop {found.drop.points:+.2f} points on {found.samples:,} images, at"
        f" least {found.drop.at_least:+.2f}"
        for found in shown
        if found.drop
    ]
    if len(failed) > len(shown):
        parts.append(f"{len(failed) - len(shown):,} more classes")
    text = f"{'; '.join(parts)} (95 % for all classes at once), limit {limit:g}"
    if unsure and not failed:
        text += f"; too few images to tell for {unsure:,} of {len(compared):,} classes"
    return Check(
        name="class-accuracy",
        passed=not failed,
        value=max(found.drop.at_least for found in compared if found.drop),
        limit=limit,
        detail=text,
        conclusive=bool(failed) or not unsure,
    )


def calibration_error(correct: Correct, confidence: npt.NDArray[np.float64]) -> float:
    """Expected calibration error: mean distance of accuracy and confidence, by confidence."""
    bins = np.clip(np.ceil(confidence * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(correct))


def _by_class(
    labels: Classes, names: Sequence[str], baseline: Answers | None, judged: Answers
) -> list[ClassEntry]:
    correct = judged.correct
    counts = paired_counts(
        correct if baseline is None else baseline.correct, correct, labels, len(names)
    )
    right = np.bincount(labels[correct], minlength=len(names)).tolist()
    together = sum(total > 0 for _, _, total in counts)
    found = []
    for name, own, (lost, won, total) in zip(names, right, counts, strict=True):
        entry = ClassEntry(name=name, samples=total, baseline=None, judged=None, drop=None)
        if total:
            entry.judged = own / total
        if total and baseline is not None:
            entry.baseline = (own + lost - won) / total
            low = paired_difference(lost, won, total, together=together).low
            entry.drop = ClassDropEntry(**_drop(lost, won, total), at_least=100 * low)
        found.append(entry)
    return found


def _drop(lost: int, won: int, total: int) -> dict[str, Any]:
    """The fields of a `PairedEntry`."""
    share = paired_difference(lost, won, total)
    return {
        "points": 100 * share.value,
        "low": 100 * share.low,
        "high": 100 * share.high,
        "only_baseline_right": lost,
        "only_engine_right": won,
    }


def _top5(baseline: Answers | None, judged: Answers) -> TopFiveEntry:
    found = judged.top(5)
    entry = TopFiveEntry(baseline=None, judged=float(found.mean()), drop=None)
    if baseline is not None:
        before = baseline.top(5)
        lost, won = int((before & ~found).sum()), int((found & ~before).sum())
        entry.baseline = float(before.mean())
        entry.drop = PairedEntry(**_drop(lost, won, len(found)))
    return entry


def _confidence(answers: Answers) -> ConfidenceEntry:
    return ConfidenceEntry(
        mean=float(answers.confidence.mean()),
        ece=calibration_error(answers.correct, answers.confidence),
    )


def _confusions(
    labels: Classes, names: Sequence[str], baseline: Answers, judged: Answers
) -> list[ConfusionEntry]:
    before, after = (
        Counter(zip(labels[wrong].tolist(), found.classes[wrong].tolist(), strict=True))
        for found in (baseline, judged)
        for wrong in (~found.correct,)
    )
    risen = sorted((before[pair] - count, pair) for pair, count in after.items())
    return [
        ConfusionEntry(
            label=names[label],
            predicted=_name(names, predicted),
            baseline=before[label, predicted],
            judged=after[label, predicted],
        )
        for rise, (label, predicted) in risen
        if rise < 0
    ]


def _changed(
    labels: Classes, names: Sequence[str], baseline: Answers, judged: Answers
) -> list[ChangedEntry]:
    kinds = np.where(baseline.correct, 0, np.where(judged.correct, 1, 2)).tolist()
    indices = np.flatnonzero(baseline.classes != judged.classes).tolist()
    indices.sort(key=lambda index: -judged.confidence[index])
    # Classes take turns, or one class could fill the gallery.
    turns: Counter[tuple[int, int]] = Counter()
    places = []
    for index in indices:
        group = (kinds[index], int(labels[index]))
        places.append((kinds[index], turns[group], index))
        turns[group] += 1
    places.sort(key=lambda place: place[:2])
    shown: Counter[int] = Counter()
    found = []
    for kind, _, index in places:
        shown[kind] += 1
        found.append(
            ChangedEntry(
                index=index,
                label=names[labels[index]],
                baseline=_name(names, int(baseline.classes[index])),
                judged=_name(names, int(judged.classes[index])),
                baseline_confidence=float(baseline.confidence[index]),
                judged_confidence=float(judged.confidence[index]),
                image=f"changed/test-{index:04d}.png" if shown[kind] <= GALLERY else None,
            )
        )
    return found


def _name(names: Sequence[str], predicted: int) -> str | None:
    return None if predicted < 0 else names[predicted]
