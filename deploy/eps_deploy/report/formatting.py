"""Wording of `report.md` and `report.html`: names, numbers, sentences and rows of tables.

The templates have every function of this module as a filter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from eps_core.stats import Interval
from eps_deploy.report.report import change, most_lost, over_limit
from eps_deploy.report.report import signed as with_sign
from eps_deploy.report.schema import (
    BlockEntry,
    ChangedEntry,
    ClassEntry,
    ComparisonEntry,
    ConfusionEntry,
    LatencyEntry,
    PairedEntry,
    Report,
    SpeedupEntry,
)

STAGES = {
    "gated-compact": "gated network → compact network (torch)",
    "compact-onnx": "compact network (torch) → model.onnx",
    "onnx-engine": "model.onnx → engine",
    "baseline-onnx": "unpruned network (torch) → baseline.onnx",
    "baseline-engine": "unpruned network: baseline.onnx → engine",
}
ACCURACIES = {
    "baseline": "trained unpruned network (torch)",
    "compact": "compact network (torch)",
    "onnx": "model.onnx (ONNX Runtime)",
    "engine": "deployed engine",
}
PERCENTILES = ("p50", "p90", "p95", "p99")
CLASSES = 20  # in a table, at most
CONFUSIONS = 10
_NAMED = 3  # classes in a sentence
_CHECKS = {
    "class-accuracy": "accuracy by class",
    "speedup": "speed-up",
    "builder": "TensorRT's builder accepts model.onnx",
}
_RUNTIMES = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}

# -- Names and numbers


def outcome(passed: bool | None) -> str:
    return {True: "passed", False: "FAILED", None: "not judged"}[passed]


def stage_name(name: str) -> str:
    return STAGES.get(name, name)


def check_title(name: str) -> str:
    kind, _, stage = name.partition("-")
    return f"parity: {stage_name(stage)}" if kind == "parity" else _CHECKS.get(name, name)


def percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.2f} %"


def signed(points: float) -> str:
    return with_sign(points).replace("-", "−")


def paired(drop: PairedEntry) -> str:
    """A drop with its interval: `+5.56 (−1.20 to +14.31)`."""
    return f"{signed(drop.points)} ({signed(drop.low)} to {signed(drop.high)})"


def predicted(name: str | None) -> str:
    return "none: not finite" if name is None else name


def removed(old: int, new: int) -> str:
    return f"{100 * (1 - new / old):.1f} %" if old else "0.0 %"


def throughput(images: float) -> str:
    return f"{images:,.0f}" if images >= 100 else f"{images:.3g}"


def integer(number: int) -> str:
    return f"{number:,}"


def short(number: int) -> str:
    """A large count with three digits: 5.55 M."""
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= power:
            return f"{number / power:.3g} {letter}"
    return integer(number)


def ratio(speedup: SpeedupEntry) -> str:
    return str(Interval(speedup.median, speedup.low, speedup.high))


def difference(value: float | None) -> str:
    if value is None:
        return "not finite"
    return "0" if value == 0 else f"{value:.3g}"


def limit(value: float | None) -> str:
    if value is None:
        return "not judged"
    return "equal" if value == 0 else f"{value:g}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def number_ranges(names: Sequence[str]) -> str:
    """`0–3, 7` for ["0", "1", "2", "3", "7"]; names that are not numbers are listed as they are."""
    runs: list[list[str]] = []
    for name in names:
        last = runs[-1][-1] if runs else ""
        if name.isdecimal() and last.isdecimal() and int(name) == int(last) + 1:
            runs[-1] = [runs[-1][0], name]
        else:
            runs.append([name])
    return ", ".join("–".join(run) for run in runs) or "none"


# -- Sentences


def verdict_line(report: Report) -> str:
    """The outcome in one line."""
    failed = [check.name for check in report.checks if not check.passed]
    total = len(report.checks)
    if failed:
        line = f"FAILED: {', '.join(failed)} ({len(failed)} of {total} checks)"
        return line + (f"; classes: {classes}" if (classes := _failed_classes(report)) else "")
    if not total:
        line = "NOT JUDGED: nothing could be checked"
    elif report.passed is None:
        line = f"NOT JUDGED YET: all {total} checks that could run passed"
    else:
        line = f"passed: all {total} checks"
    if doubts := _doubts(report):
        line += f" ({'; '.join(doubts)})"
    if report.not_run:
        line += f"; not run: {', '.join(entry.what for entry in report.not_run)}"
    return line


def verdict_sentences(report: Report) -> str:
    """The outcome in sentences, for below a headline that has it in a word."""
    failed = [check_title(check.name) for check in report.checks if not check.passed]
    total = len(report.checks)
    if failed:
        titles = "; ".join(title.removeprefix("parity: ") for title in failed)
        sentences = [f"{len(failed)} of {total} checks failed: {titles}."]
        if classes := _failed_classes(report):
            sentences.append(f"Classes that lost too much: {classes}.")
    elif total:
        could = " that could run" if report.passed is None else ""
        sentences = [f"All {total} checks{could} passed."]
    else:
        sentences = ["Nothing could be checked."]
    sentences += [f"{capital(doubt)}." for doubt in _doubts(report)]
    if report.not_run:
        sentences.append(f"Not run: {', '.join(entry.what for entry in report.not_run)}.")
    return " ".join(sentences)


def _doubts(report: Report) -> list[str]:
    """Why checks that passed may be wrong."""
    unsure = [check.name for check in report.checks if check.passed and not check.conclusive]
    few = [name for name in ("accuracy", "class-accuracy") if name in unsure]
    doubts = [f"too few images to be sure: {', '.join(few)}"] if few else []
    if "speedup" in unsure:
        doubts.append("the machine was too busy to be sure: speedup")
    return doubts


def _failed_classes(report: Report) -> str:
    limit = report.goals.max_class_drop
    return "" if limit is None else _names(over_limit(report.answers, limit))


def _names(classes: Sequence[ClassEntry]) -> str:
    """The names of the first classes, and how many more there are."""
    names = ", ".join(found.name for found in classes[:_NAMED])
    more = len(classes) - _NAMED
    return f"{names} and {more:,} more" if more > 0 else names


def subtitle(report: Report) -> str:
    """Engine, precision and network in a few words."""
    engine, blocks = report.environment.engine, report.blocks
    runtime = _RUNTIMES.get(engine.get("runtime", ""), report.engine)
    provider = f" ({engine['provider']})" if engine.get("provider") else ""
    network = f"{blocks.compact} of {blocks.baseline} residual blocks"
    return f"{runtime}{provider} · {report.precision.name} · {network}"


def goals(report: Report) -> str:
    goals = report.goals
    fast = "as fast" if goals.min_speedup == 1 else f"{goals.min_speedup:g} times as fast"
    by_class, judged = "", ", judged"
    if goals.max_class_drop is not None:
        by_class = f" at most {goals.max_class_drop:g} in any class,"
        judged = "; the last two are judged"
    return (
        f"Goals: at most {goals.max_accuracy_drop:g} percentage points less accuracy,{by_class} and"
        f" at batch 1 at least {fast}{judged} by the lower end of the interval."
    )


def drop_sentences(report: Report) -> list[str]:
    """The drop with its interval, and whether there are enough images."""
    drop = report.accuracy.drop
    if drop is None:
        return ["No trained unpruned network to compare with: the drop in accuracy is not known."]
    sentences = [
        f"Drop from the unpruned network to the {ACCURACIES[report.accuracy.judged]}:"
        f" {signed(drop.points)} percentage points, 95 % interval {signed(drop.low)} to"
        f" {signed(drop.high)} ({drop.method}). {drop.only_baseline_right:,} images only the"
        f" unpruned network got right, {drop.only_engine_right:,} only the compact one."
    ]
    if not drop.conclusive:
        sentences.append(
            "The limit is inside the interval: there are too few images to tell for sure, and the"
            " check judges the measured drop."
        )
    return sentences


def class_notes(report: Report) -> list[str]:
    """How the classes are ordered and judged, and which were left out."""
    classes = report.answers.classes
    listed = len(listed_classes(report))
    notes = []
    if report.accuracy.drop:
        notes.append(
            "Drop in percentage points with its 95 % interval, paired image by image. The classes"
            " are ordered by its lower end, as classes with few images lose many points by chance."
        )
    limit = report.goals.max_class_drop
    if limit is not None:
        notes.append(
            f'The check fails for a class that lost more than {limit:g} points by the column "at'
            ' least": the lower end when the intervals of all classes hold at once with 95 %.'
        )
    top5 = report.answers.top5
    if top5 and top5.drop:
        notes.append(f"Drop in top-5 accuracy: {paired(top5.drop)} percentage points.")
    empty = [found for found in classes if not found.samples]
    if empty:
        notes.append(f"Without test images: {_names(empty)}.")
    if hidden := len(classes) - len(empty) - listed:
        notes.append(f"{hidden:,} more classes are in report.json.")
    return notes


def changed_sentences(report: Report) -> list[str]:
    """How many answers changed, which way, and how many images are shown."""
    changed = report.answers.changed
    if changed is None:
        return []
    samples = report.accuracy.samples
    if not changed:
        return [f"Both networks predict the same class for all {samples:,} test images."]
    parts = ", ".join(f"{title} {len(found):,}" for title, found in gallery(changed).items())
    differs = f"The predicted class differs for {len(changed):,} of {samples:,} test images"
    shown = sum(found.image is not None for found in changed)
    some = f"{shown} of them are shown, from all classes in turn; the others are in report.json."
    return [f"{differs}: {parts}.", *([some] if shown < len(changed) else [])]


def latency_notes(report: Report) -> list[str]:
    """How the latency was measured, one note for the baseline and one for each batch size."""
    flops = report.flops
    notes = [
        f"The unpruned network is the {report.latency_baseline}, in the same engine with the same"
        f" settings. Its FLOPs are {flops.baseline / max(flops.compact, 1):.2f} times those of the"
        " compact one."
    ]
    for entry in report.latency:
        notes.append(
            f"Batch {entry.batch}: {entry.blocks} blocks of {entry.runs_per_block} runs of each"
            f" network, alternating. {entry.noise}"
            + ("" if entry.warm else " The warm-up did not become steady in its time.")
            + ("" if entry.p99_reliable else " Fewer than 200 runs: p99 is unreliable.")
        )
    return notes


# -- Rows of tables, and blocks by stage


def sizes(report: Report) -> list[tuple[str, int, int]]:
    """Title, count of the unpruned network and count of the compact one."""
    return [
        ("residual blocks", report.blocks.baseline, report.blocks.compact),
        ("parameters", report.parameters.baseline, report.parameters.compact),
        ("FLOPs for one image", report.flops.baseline, report.flops.compact),
    ]


def listed_classes(report: Report) -> list[ClassEntry]:
    """The classes of the table: those that lost most, or without a baseline the least accurate."""
    known = [found for found in report.answers.classes if found.judged is not None]
    least = sorted(known, key=lambda found: found.judged or 0.0)
    return (most_lost(report.answers) or least)[:CLASSES]


def listed_confusions(report: Report) -> list[ConfusionEntry]:
    return (report.answers.confusions or [])[:CONFUSIONS]


def answer_rows(report: Report) -> list[tuple[str, str, str]]:
    """Title, and value of the unpruned network and of the judged one."""
    answers = report.answers
    top5, before, after = answers.top5, answers.confidence.baseline, answers.confidence.judged
    judged = getattr(report.accuracy, report.accuracy.judged)
    rows = [("top-1 accuracy", percent(report.accuracy.baseline), percent(judged))]
    if top5:
        rows.append(("top-5 accuracy", percent(top5.baseline), percent(top5.judged)))
    for title, key in (("mean confidence", "mean"), ("calibration error (ECE)", "ece")):
        rows.append((title, percent(getattr(before, key, None)), percent(getattr(after, key))))
    return rows


def gallery(changed: Sequence[ChangedEntry]) -> dict[str, list[ChangedEntry]]:
    """Changed answers by which of the networks was right."""
    groups: dict[str, list[ChangedEntry]] = {
        "only the unpruned network right": [],
        "only the compact network right": [],
        "both wrong": [],
    }
    lost, won, neither = groups.values()
    for found in changed:
        right = lost if found.baseline == found.label else neither
        (won if found.judged == found.label else right).append(found)
    return {title: found for title, found in groups.items() if found}


def facts(report: Report) -> list[tuple[str, str, str]]:
    """The numbers that most readers look for: title, number, explanation."""
    rows = []
    for entry in report.latency:
        speedup = entry.speedup
        between = f"{speedup.low:.2f} to {speedup.high:.2f}: {entry.verdict}"
        rows.append((f"Speed-up, batch {entry.batch}", f"{speedup.median:.2f}×", between))
    drop = report.accuracy.drop
    compared = "no trained unpruned network to compare with"
    if drop:
        compared = f"{change(drop.points)} the unpruned network"
    rows.append(("Accuracy", percent(getattr(report.accuracy, report.accuracy.judged)), compared))
    (_, old, new), *larger = sizes(report)
    rows.append(("Residual blocks", f"{new} of {old}", f"{old - new} removed"))
    for title, old, new in larger:
        rows.append((capital(title), short(new), f"of {short(old)}: {removed(old, new)} less"))
    return rows


def comparisons(entry: LatencyEntry) -> Iterator[tuple[str, ComparisonEntry]]:
    """The ways in which a batch size was timed: title and times."""
    yield "call of the engine", entry
    if entry.end_to_end is not None:
        yield "image to label", entry.end_to_end
    if entry.device is not None:
        yield "GPU alone", entry.device


def precision_rows(report: Report) -> list[tuple[str, str]]:
    precision = report.precision
    unknown = "not known: the engine is not built yet"
    if report.accuracy.engine is not None:
        unknown = "not reported by the runtime"
    executed = unknown if precision.executed is None else _types(precision.executed)
    rows = [
        ("requested", precision.name),
        ("type of what is not quantized", precision.float),
        ("TF32 products", "allowed" if precision.tf32 else "off"),
        ("Conv, Gemm and MatMul in model.onnx", _types(precision.graph)),
        ("as executed by the runtime", executed),
    ]
    if calibration := precision.calibration:
        text = f"{calibration.samples:,} training images, method {calibration.method}"
        rows.append(("int8 calibration", f"{text}, SHA-256 {calibration.sha256[:12]}…"))
    if precision.kept:
        names = ", ".join(precision.kept)
        if precision.quantized and "int8" not in precision.graph:
            names += " (that is all of it: nothing is left in int8)"
        rows.append(("blocks kept in higher precision", names))
    if repair := precision.repair:
        text = f"the drop went from {repair.drop_before:+.2f} to {repair.drop_after:+.2f} points in"
        text += f" {repair.trials} trials"
        rows.append(("repair", text + ("" if repair.passed else "; the limit still fails")))
    return rows


def environment_rows(report: Report) -> list[tuple[str, str]]:
    """Title and text of every fact; a fact without a title of its own is named by its key."""
    found = report.environment
    engine = dict(found.engine)
    runtime = engine.pop("runtime", "")
    engine.pop("name", None)
    version = engine.pop("version", "")
    packages = [f"{name} {version}" for name, version in found.packages.items() if version]
    rows = [
        ("Engine", f"{_RUNTIMES.get(runtime, runtime)} {version}".strip()),
        *_flat(engine),
        ("Processor", f"{found.processor}, {found.cores} cores"),
        ("System", f"{found.system}, Python {found.python}"),
        ("Packages", ", ".join(packages)),
        ("Command", report.command),
    ]
    if report.resumed:
        rows.append(("Taken from an earlier run", ", ".join(report.resumed)))
    return rows


def _types(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{nodes} in {name}" for name, nodes in counts.items()) or "none"


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        title = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{title}: ")
        elif isinstance(value, list):
            yield capital(title), ", ".join(map(str, value)) or "none"
        elif isinstance(value, bool):
            yield capital(title), "yes" if value else "no"
        elif value is not None:
            yield capital(title), str(value)


class StageStrip(NamedTuple):
    """The blocks of one stage in the order of computation; `names` of those that are computed."""

    name: str
    blocks: list[BlockEntry]
    alive: int
    names: str


def stage_strips(report: Report) -> list[StageStrip]:
    stages: dict[str, list[BlockEntry]] = {}
    for block in report.blocks.map:
        stages.setdefault(block.stage, []).append(block)
    strips = []
    for name, blocks in stages.items():
        alive = [b.name.removeprefix(f"{name}.") for b in blocks if b.state == "alive"]
        strips.append(StageStrip(name, blocks, len(alive), number_ranges(alive)))
    return strips
