"""The entries of `report.json`: checks with their outcome, measurements, and the environment.

`eps_deploy.report.schema` declares the format. The answers are compared class by class too: pruning
harms some classes far more than the mean accuracy shows (Hooker et al., "What Do Compressed Deep
Neural Networks Forget?", arXiv 1911.05248).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eps_core.checks import Check, Parity
from eps_core.machine import machine
from eps_core.stats import paired_counts, paired_difference
from eps_deploy.bench.accuracy import Answers, Classes, Correct
from eps_deploy.bench.latency import CALL, DEVICE, END_TO_END, LatencyResult
from eps_deploy.export.mixed_precision import Repair
from eps_deploy.export.types import FLOAT16_MAX, Peak
from eps_deploy.precision import Precision
from eps_deploy.report.schema import SCHEMA as SCHEMA
from eps_deploy.report.schema import (
    AnswersEntry,
    ChangedEntry,
    ClassDropEntry,
    ClassEntry,
    ConfidenceEntry,
    ConfidencesEntry,
    ConfusionEntry,
    DropEntry,
    PairedEntry,
    TopFiveEntry,
    parse,
)

TOP5_ABOVE = 10  # classes; among ten, half of all guesses are in the top five
GALLERY = 24  # images of each kind of change, at most
_BINS = 15  # of the calibration error, as in Guo et al., arXiv 1706.04599
_METHOD = "paired difference, 95 % score interval (Tango 1998)"
_PACKAGES = (
    "eps-resnet",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "pycuda",
    "cuda-bindings",
    "numpy",
)


def change(drop: float) -> str:
    """A drop in percentage points, in words that a network follows: `0.50 points below`."""
    if drop == 0:
        return "as accurate as"
    return f"{abs(drop):.2f} points {'below' if drop > 0 else 'above'}"


def signed(points: float) -> str:
    return f"{round(points, 2) + 0.0:+.2f}"  # no minus before 0.00


# -- Checks


def check_entry(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "passed": check.passed,
        "value": check.value,
        "limit": check.limit,
        "text": check.detail,
        "conclusive": check.conclusive,
    }


def parity_check(parity: Parity) -> Check | None:
    """A stage's logits against those of the stage before, relative; None without a limit."""
    limit = parity.limit
    if limit is None:
        return None
    if parity.relative is None:
        text = "some logits are not finite"
    elif limit == 0:
        text = "equal to the last bit" if parity.passed else f"differ by {parity.max_abs:.3g}"
    else:
        text = f"largest difference {parity.relative:.2g} of the largest logit, limit {limit:g}"
    name, passed = f"parity-{parity.stage}", bool(parity.passed)
    return Check(name, passed, text, value=parity.relative, limit=limit)


def agreement_check(share: float, limit: float, samples: int) -> Check:
    """Share of images for which the engine and the compact network in torch give one class."""
    text = (
        f"the class of the compact network on {100 * share:.2f} % of {samples:,} images,"
        f" limit {100 * limit:g} %"
    )
    return Check("agreement", share >= limit, text, value=share, limit=limit)


def headroom_check(peak: Peak, samples: int) -> Check:
    """The largest activation of the float16 part against the largest number that float16 has."""
    value = peak.value if math.isfinite(peak.value) else None
    number = "not finite" if value is None else f"{value:,.5g}"
    text = (
        f"largest activation {number} at {peak.node}, on {samples:,} test images; float16 ends at"
        f" {FLOAT16_MAX:g}"
    )
    return Check("headroom", peak.value <= FLOAT16_MAX, text, value=value, limit=FLOAT16_MAX)


def accuracy_check(baseline: Correct, engine: Correct, limit: float) -> tuple[Check, DropEntry]:
    """The engine's accuracy against the trained baseline's, image by image.

    `limit` is in percentage points; a drop above 0 means that the baseline is better.
    """
    counts = _paired(baseline, engine)
    conclusive = counts["high"] <= limit or counts["low"] > limit
    drop = DropEntry(**counts, conclusive=conclusive, method=_METHOD)
    text = (
        f"{change(drop.points)} the baseline on {len(baseline):,} images"
        f" (95 % interval of the drop {signed(drop.low)} to {signed(drop.high)} points),"
        f" limit {limit:g}"
    )
    if not conclusive:
        text += "; too few images to tell"
    # Rounding must not fail a drop of exactly the limit, such as 1 image of 200 at 0.5 points.
    passed, value = drop.points <= limit + 1e-9, drop.points
    check = Check("accuracy", passed, text, value=value, limit=limit, conclusive=conclusive)
    return check, drop


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
        "class-accuracy",
        not failed,
        text,
        value=max(found.drop.at_least for found in compared if found.drop),
        limit=limit,
        conclusive=bool(failed) or not unsure,
    )


def speedup_check(latency: LatencyResult, limit: float) -> Check:
    """The speed-up of whole calls; its whole interval must reach the limit."""
    speedup = latency.times[CALL][1].speedup
    assert speedup is not None, "of the compact engine"
    # Then even the ratio is wrong: long calls are interrupted and short ones are not.
    starved = latency.conditions.starved
    text = (
        f"{speedup.value:.2f} times as fast at batch {latency.batch} (95 % interval"
        f" {speedup.low:.2f} to {speedup.high:.2f}), limit {limit:g} for its lower end"
    )
    if starved:
        text += "; the machine was too busy to be sure"
    sure = not starved and not speedup.low < limit <= speedup.high
    low = speedup.low
    return Check("speedup", low >= limit, text, value=low, limit=limit, conclusive=sure)


# -- Measurements


def parity_entry(parity: Parity) -> dict[str, Any]:
    entry = {**asdict(parity), "batches": list(parity.batches), "passed": parity.passed}
    del entry["inputs"]
    return entry


def precision_entry(
    precision: Precision,
    *,
    graph: dict[str, int],
    executed: dict[str, int] | None,
    calibration: dict[str, Any] | None = None,
    kept: Sequence[str] = (),
    repair: Repair | None = None,
) -> dict[str, Any]:
    """Requested precision and the types in which layers compute.

    Args:
        graph: number of Conv, Gemm and MatMul nodes of model.onnx by type.
        executed: the same as the runtime executes them; None if it does not report it.
        calibration: `samples`, `method` and `sha256`, for int8.
        kept: blocks that `--repair` kept in higher precision.
    """
    return {
        **asdict(precision),
        "graph": graph,
        "executed": executed,
        "calibration": calibration,
        "kept": list(kept),
        "repair": repair
        and {
            "trials": repair.trials,
            "drop_before": repair.before.value,
            "drop_after": repair.after.value,
            "passed": repair.after.passed,
        },
    }


def blocks_entry(
    blocks: Sequence[str], gone: Collection[str], live: Collection[str] = ()
) -> dict[str, Any]:
    """Residual blocks and their states, in the order of computation.

    Args:
        blocks: names of all blocks, each the name of its stage, a dot, and its position there.
        live: blocks of `gone` whose gate was open, so that removing them was not lossless.
    """
    states = {name: "removed" if name in live else "dead" for name in gone}
    return {
        "baseline": len(blocks),
        "compact": len(blocks) - len(gone),
        "removed": [name for name in blocks if name in gone],
        "map": [
            {"name": name, "stage": name.rpartition(".")[0], "state": states.get(name, "alive")}
            for name in blocks
        ],
    }


def latency_entry(latency: LatencyResult) -> dict[str, Any]:
    """Latency of a baseline and a compact engine, in this order."""
    return {
        "batch": latency.batch,
        **(_comparison(latency, CALL) or {}),
        "end_to_end": _comparison(latency, END_TO_END),
        "device": _comparison(latency, DEVICE),
        "blocks": latency.blocks,
        "runs_per_block": latency.runs,
        "p99_reliable": latency.p99_reliable,
        "warm": latency.warm,
        "spread": latency.spread,
        "noise": latency.noise,
        "conditions": asdict(latency.conditions),
    }


def _comparison(latency: LatencyResult, way: str) -> dict[str, Any] | None:
    if way not in latency.times:
        return None
    baseline, compact = latency.times[way]
    speedup = compact.speedup
    return {
        "baseline_ms": baseline.ms,
        "compact_ms": compact.ms,
        "speedup": speedup and {"median": speedup.value, "low": speedup.low, "high": speedup.high},
        "verdict": compact.verdict,
        "throughput": {"baseline": baseline.rate, "compact": compact.rate},
    }


# -- What both networks predict, by class


def answers_entry(
    labels: Classes, names: Sequence[str], baseline: Answers | None, judged: Answers
) -> AnswersEntry:
    """Compare the deployed network with the trained baseline on the same images, class by class.

    Args:
        labels: classes of the images, int64 `[N]`.
        names: of all classes.
    """
    entry = AnswersEntry(
        classes=_by_class(labels, names, baseline, judged),
        top5=_top5(baseline, judged) if len(names) > TOP5_ABOVE else None,
        confidence=ConfidencesEntry(baseline=None, judged=_confidence(judged)),
        confusions=None,
        changed=None,
    )
    if baseline is not None:
        entry.confidence.baseline = _confidence(baseline)
        entry.confusions = _confusions(labels, names, baseline, judged)
        entry.changed = _changed(labels, names, baseline, judged)
    return entry


def most_lost(answers: AnswersEntry) -> list[ClassEntry]:
    """The classes that can be compared, by the lower end of the drop's interval.

    By the measured drop, a class with one or two images would often come first by chance.
    """
    compared = [(found.drop.low, found) for found in answers.classes if found.drop]
    return [found for _, found in sorted(compared, key=lambda pair: -pair[0])]


def over_limit(answers: AnswersEntry, limit: float) -> list[ClassEntry]:
    """The classes that lost significantly more than `limit` points."""
    return [c for c in most_lost(answers) if c.drop and c.drop.at_least > limit + 1e-9]


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


def _paired(baseline: Correct, engine: Correct) -> dict[str, Any]:
    lost, won = int((baseline & ~engine).sum()), int((engine & ~baseline).sum())
    return _drop(lost, won, len(baseline))


def _top5(baseline: Answers | None, judged: Answers) -> TopFiveEntry:
    found = judged.top(5)
    entry = TopFiveEntry(baseline=None, judged=float(found.mean()), drop=None)
    if baseline is not None:
        before = baseline.top(5)
        entry.baseline = float(before.mean())
        entry.drop = PairedEntry(**_paired(before, found))
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
    places = {}
    for index in indices:
        group = (kinds[index], int(labels[index]))
        places[index] = (kinds[index], turns[group])
        turns[group] += 1
    shown: Counter[int] = Counter()
    found = []
    for index in sorted(indices, key=lambda index: places[index]):
        shown[kinds[index]] += 1
        found.append(
            ChangedEntry(
                index=index,
                label=names[labels[index]],
                baseline=_name(names, int(baseline.classes[index])),
                judged=_name(names, int(judged.classes[index])),
                baseline_confidence=float(baseline.confidence[index]),
                judged_confidence=float(judged.confidence[index]),
                image=f"changed/test-{index:04d}.png" if shown[kinds[index]] <= GALLERY else None,
            )
        )
    return found


def _name(names: Sequence[str], predicted: int) -> str | None:
    return None if predicted < 0 else names[predicted]


# -- The report as a whole


def environment(engine: dict[str, Any]) -> dict[str, Any]:
    """Versions, processor and threads; nothing that identifies the machine."""
    return {
        "engine": engine,
        "packages": {name: _version(name) for name in _PACKAGES},
        **machine(),
    }


def verdict(checks: Iterable[Check], *, deferred: bool = False) -> bool | None:
    """False if a check failed; None without checks, or if the engine is not built yet."""
    outcomes = [check.passed for check in checks]
    if not all(outcomes):
        return False
    return None if deferred or not outcomes else True


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write `report.json`; raises ValueError if `report` does not follow its format."""
    parse(report)
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return package_version(package)
    except PackageNotFoundError:
        return None
