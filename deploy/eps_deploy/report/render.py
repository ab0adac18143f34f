"""`report.html`: the report as one page that needs no network, on a screen, a phone or paper.

Everything that comes from outside (names of classes and blocks, messages, the command line) is
escaped, and the page's own content security policy lets it run and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from eps_deploy.bench.latency import LEAST

# -- What `report.md` and `report.html` say in the same words: names, numbers, sentences

Report = Mapping[str, Any]

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
    "engine": "engine that ships",
}
SIZES = {
    "blocks": "residual blocks",
    "parameters": "parameters",
    "flops": "FLOPs for one image",
}
PERCENTILES = ("p50", "p90", "p95", "p99")
_SAME = "same answers: "
_RUNTIMES = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


def verdict_line(report: Report) -> str:
    """The outcome in one sentence."""
    checks = report["checks"]
    failed = [check["name"] for check in checks if not check["passed"]]
    if failed:
        return f"FAILED: {', '.join(failed)} ({len(failed)} of {len(checks)} checks)"
    if not checks:
        line = "NOT JUDGED: nothing could be checked"
    elif report["passed"] is None:
        line = f"NOT JUDGED YET: all {len(checks)} checks that could run passed"
    else:
        line = f"passed: all {len(checks)} checks"
    if doubts := _doubts(report):
        line += f" ({'; '.join(doubts)})"
    if report["not_run"]:
        line += f"; not run: {', '.join(entry['what'] for entry in report['not_run'])}"
    return line


def verdict_sentences(report: Report) -> str:
    """The same where the outcome itself stands above it already."""
    checks = report["checks"]
    failed = [
        check_title(check["name"]).removeprefix(_SAME) for check in checks if not check["passed"]
    ]
    left_out = [entry["what"] for entry in report["not_run"]]
    if failed:
        sentences = [f"{len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}."]
    elif not checks:
        sentences = ["Nothing could be checked."]
    else:
        could = " that could run" if report["passed"] is None else ""
        sentences = [f"All {len(checks)} checks{could} passed."]
    sentences += [f"{capital(doubt)}." for doubt in _doubts(report)]
    if left_out:
        sentences.append(f"Not run: {', '.join(left_out)}.")
    return " ".join(sentences)


def _doubts(report: Report) -> list[str]:
    """Why one cannot be sure of checks that passed."""
    unsure = {
        check["name"] for check in report["checks"] if check["passed"] and not check["conclusive"]
    }
    causes = {"accuracy": "too few images", "speedup": "the machine was too busy"}
    return [f"{cause} to be sure: {name}" for name, cause in causes.items() if name in unsure]


def outcome(passed: bool | None) -> str:
    return {True: "passed", False: "FAILED", None: "not judged"}[passed]


def stage_name(name: str) -> str:
    return STAGES.get(name, name)


def check_title(name: str) -> str:
    """What a check is about, in words."""
    prefix, _, rest = name.partition("parity-")
    if not prefix and rest:
        return f"{_SAME}{stage_name(rest)}"
    titles = {"speedup": "speed-up", "builder": "TensorRT's builder takes model.onnx"}
    return titles.get(name, name)


def percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.2f} %"


def signed(points: float) -> str:
    return f"{round(points, 2) + 0.0:+.2f}".replace("-", "−")  # no minus before 0.00


def removed(old: int, new: int) -> str:
    return f"{100 * (1 - new / old):.1f} %" if old else "0.0 %"


def milliseconds(value: float) -> str:
    """Three digits behind the point for what is short, fewer for what is long."""
    if value < 10:
        return f"{value:.3f}"
    return f"{value:.2f}" if value < 100 else f"{value:,.1f}"


def rate(images: float) -> str:
    return f"{images:,.0f}" if images >= 100 else f"{images:.3g}"


def short(number: int) -> str:
    """A large count with three digits: 5.55 M."""
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= power:
            return f"{number / power:.3g} {letter}"
    return f"{number:,}"


def ratio(speedup: Mapping[str, float]) -> str:
    return f"{speedup['median']:.2f} ({speedup['low']:.2f} to {speedup['high']:.2f})"


def difference(value: float | None) -> str:
    if value is None:
        return "not finite"
    return "0" if value == 0 else f"{value:.3g}"


def limit(value: float | None) -> str:
    if value is None:
        return "not judged"
    return "equal" if value == 0 else f"{value:g}"


def change(points: float) -> str:
    """A drop in percentage points, in words."""
    if points == 0:
        return "as accurate as the unpruned network"
    return f"{abs(points):.2f} points {'below' if points > 0 else 'above'} the unpruned network"


def goals(report: Report) -> str:
    wanted = report["goals"]
    least = wanted["min_speedup"]
    fast = "as fast" if least == 1 else f"{least:g} times as fast"
    return (
        f"Goals: at most {wanted['max_accuracy_drop']:g} percentage points less accuracy, and at"
        f" batch 1 at least {fast}, judged by the lower end of the interval."
    )


def drop_sentences(accuracy: Report) -> list[str]:
    """The drop with its interval, and how sure one can be."""
    drop = accuracy["drop"]
    if drop is None:
        return ["No trained unpruned network to compare with: the drop in accuracy is not known."]
    judged = ACCURACIES[accuracy["judged"]]
    sentences = [
        f"Drop from the unpruned network to the {judged}: {signed(drop['points'])} percentage"
        f" points, 95 % interval {signed(drop['low'])} to {signed(drop['high'])}"
        f" ({drop['method']}). {drop['only_baseline_right']:,} images only the unpruned"
        f" network got right, {drop['only_engine_right']:,} only the compact one."
    ]
    if not drop["conclusive"]:
        sentences.append(
            "The interval reaches across the limit: there are too few images to tell for sure, and"
            " the check judges the measured drop."
        )
    return sentences


def comparisons(entry: Report) -> Iterator[tuple[str, Report]]:
    """The ways in which a batch size was timed: title and times."""
    yield "call of the engine", entry
    for key, title in (("end_to_end", "picture to label"), ("device", "GPU alone")):
        if entry[key] is not None:
            yield title, entry[key]


def latency_notes(report: Report) -> list[str]:
    """What one has to know of the latency measurements, a sentence or two each."""
    flops = report["flops"]
    notes = [
        f"The unpruned network is the {report['latency_baseline']}, in the same engine with the"
        " same settings. Its FLOPs are"
        f" {flops['baseline'] / max(flops['compact'], 1):.2f} times those of the compact one."
    ]
    for entry in report["latency"]:
        note = (
            f"Batch {entry['batch']}: {entry['blocks']} blocks of {entry['runs_per_block']} runs of"
            f" each network, alternating. {entry['noise']}"
        )
        if not entry["warm"]:
            note += " The warm-up did not become flat in its time."
        if not entry["p99_reliable"]:
            note += " Fewer than 200 runs: p99 is unreliable."
        notes.append(note)
    return notes


def precision_rows(report: Report) -> list[tuple[str, str]]:
    found = report["precision"]
    rows = [
        ("asked for", found["name"]),
        ("type of what is not quantised", found["float"]),
        ("TF32 products", "allowed" if found["tf32"] else "off"),
        ("Conv, Gemm and MatMul in model.onnx", _types(found["graph"])),
        ("what the runtime computes them in", _executed(report)),
    ]
    calibration = found["calibration"]
    if calibration is not None:
        text = f"{calibration['samples']:,} training images, method {calibration['method']}"
        rows.append(("int8 calibration", f"{text}, SHA-256 {calibration['sha256'][:12]}…"))
    if found["kept"]:
        whole = found["quantized"] and "int8" not in found["graph"]
        all_of_it = " (that is all of it: nothing is left in int8)" if whole else ""
        names = ", ".join(found["kept"]) + all_of_it
        rows.append(("blocks kept in higher precision", names))
    if repair := found["repair"]:
        drops = f"{repair['drop_before']:+.2f} to {repair['drop_after']:+.2f} points"
        outcome = "" if repair["passed"] else "; the limit does not hold even so"
        text = f"the drop went from {drops} in {repair['trials']} trials{outcome}"
        rows.append(("repair", text))
    return rows


def environment_rows(report: Report) -> list[tuple[str, str]]:
    """Title and text of every fact; what has no title of its own gets its key for one."""
    facts = dict(report["environment"])
    engine = dict(facts.pop("engine"))
    packages = facts.pop("packages")
    runtime = _RUNTIMES.get(engine.get("runtime", ""), engine.get("runtime", ""))
    rows = [("Engine", f"{runtime} {engine.get('version', '')}".strip())]
    rows += _flat({key: engine[key] for key in engine if key not in ("runtime", "version", "name")})
    rows += [
        ("Processor", f"{facts.pop('processor')}, {facts.pop('cores')} cores"),
        ("System", f"{facts.pop('system')}, Python {facts.pop('python')}"),
        ("Packages", ", ".join(f"{name} {packages[name]}" for name in packages if packages[name])),
    ]
    rows += _flat(facts)
    rows.append(("Command", report["command"]))
    if report["resumed"]:
        rows.append(("Taken from an earlier run", ", ".join(report["resumed"])))
    return rows


def subtitle(report: Report) -> str:
    """Engine, precision and network in a few words."""
    engine = report["environment"]["engine"]
    runtime = _RUNTIMES.get(engine.get("runtime", ""), report["engine"])
    provider = engine.get("provider")
    words = [runtime if not provider else f"{runtime} ({provider})", report["precision"]["name"]]
    blocks = report["blocks"]
    words.append(f"{blocks['compact']} of {blocks['baseline']} residual blocks")
    return " · ".join(words)


def _executed(report: Report) -> str:
    executed = report["precision"]["executed"]
    if executed is not None:
        return _types(executed)
    built = report["accuracy"]["engine"] is not None
    return "it does not tell" if built else "not known: the engine is still to be built"


def _types(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {name}" for name, count in counts.items()) or "none"


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in facts.items():
        title = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows += _flat(value, f"{title}: ")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            rows.append((capital(title), ", ".join(str(item) for item in value) or "none"))
        elif isinstance(value, bool):
            rows.append((capital(title), "yes" if value else "no"))
        elif value is not None:
            rows.append((capital(title), str(value)))
    return rows


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# -- Where things stand in the figures of `report.html`: axes, and positions in per cent of the
#    width
#
# Positions are per cent of the figure's width, so that a figure fits any screen while its text
# keeps its size.

_MARGIN = 4.0  # per cent at both ends, which the text of the outermost ticks needs
_TICKS = 5
_STEPS = (1, 2, 2.5, 5, 10)
_TAIL = 3.0  # times the longer median: what lies beyond would leave no room for the medians
_FAR = 3.0  # a limit is drawn up to so many times the span of what was measured


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale from `low` to `high` with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Place of `value` in per cent of the width; what lies outside goes to the nearer end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(_MARGIN + share * (100 - 2 * _MARGIN), 3)

    def width(self, low: float, high: float) -> float:
        return round(self.at(high) - self.at(low), 3)

    def anchor(self, value: float) -> str:
        """Of a text at `value`: away from the nearer edge."""
        place = self.at(value)
        return "start" if place < 25 else "end" if place > 75 else "middle"

    def label(self, tick: float) -> str:
        return f"{tick:.6g}".replace("-", "−")


def axis(values: Iterable[float]) -> Axis:
    """A scale that holds all `values`, with about five ticks at round numbers."""
    found = list(values)
    low, high = min(found), max(found)
    if high - low < 1e-9 * max(abs(high), 1e-9):
        low, high = low - max(abs(low) / 2, 0.5), high + max(abs(high) / 2, 0.5)
    step = _step((high - low) / (_TICKS - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(index * step, 12) + 0.0 for index in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def _step(rough: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in _STEPS if step * power >= 0.8 * rough)


@dataclass(frozen=True, kw_only=True, slots=True)
class DropFigure:
    """The drop in accuracy against its limit, in percentage points.

    Attributes:
        limit: None when it lies too far from what was measured to be drawn.
    """

    axis: Axis
    points: float
    low: float
    high: float
    limit: float | None


def drop_figure(report: Report) -> DropFigure | None:
    """None when there is no drop to draw."""
    drop = report["accuracy"]["drop"]
    if drop is None:
        return None
    measured = [0.0, drop["points"], drop["low"], drop["high"]]
    span = max(measured) - min(measured)
    limit: float | None = report["goals"]["max_accuracy_drop"]
    assert limit is not None
    if limit > max(measured) + _FAR * max(span, 0.05):
        limit = None
    return DropFigure(
        axis=axis([*measured, *([] if limit is None else [limit])]),
        points=drop["points"],
        low=drop["low"],
        high=drop["high"],
        limit=limit,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TimesFigure:
    """Times of both networks for one batch size and one way of timing.

    Percentiles may lie beyond the axis: they are named at its end.
    """

    batch: int
    title: str
    reliable: bool
    axis: Axis
    rows: tuple[tuple[str, Mapping[str, float]], ...]


def times_figures(report: Report) -> list[TimesFigure]:
    figures = []
    for entry in report["latency"]:
        for title, found in comparisons(entry):
            rows = (("unpruned", found["baseline_ms"]), ("compact", found["compact_ms"]))
            longest = max(max(times.values()) for _, times in rows)
            median = max(times["p50"] for _, times in rows)
            figures.append(
                TimesFigure(
                    batch=entry["batch"],
                    title=title,
                    reliable=entry["p99_reliable"],
                    axis=axis([0.0, min(longest, _TAIL * median)]),
                    rows=rows,
                )
            )
    return figures


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioFigure:
    """Speed-ups with their intervals on one scale, with the ratio of the FLOPs.

    Attributes:
        lines: kind (`one`, `flops`, `goal`), text and value of what the speed-ups are held against;
            those that lie too far away to be drawn are left out.
        rows: title, interval, verdict.
    """

    axis: Axis
    lines: tuple[tuple[str, str, float], ...]
    rows: tuple[tuple[str, Mapping[str, float], str], ...]


def ratio_figure(report: Report) -> RatioFigure | None:
    """None when no latency was measured."""
    rows = tuple(
        (f"batch {entry['batch']}, {title}", found["speedup"], found["verdict"])
        for entry in report["latency"]
        for title, found in comparisons(entry)
    )
    if not rows:
        return None
    measured = [1.0, *(speedup[end] for _, speedup, _ in rows for end in ("low", "high"))]
    farthest = max(measured) + _FAR * (max(measured) - min(measured)) + 0.1
    lines = [("one", "1: as fast", 1.0)]
    flops = report["flops"]["baseline"] / max(report["flops"]["compact"], 1)
    if flops <= farthest:
        lines.append(("flops", f"FLOPs {flops:.2f}", flops))
    goal = report["goals"]["min_speedup"]
    if 0 < goal <= farthest and goal != 1:  # a goal of 1 is drawn anyway
        lines.append(("goal", f"goal {goal:g}", goal))
    values = [*measured, *(value for _, _, value in lines)]
    return RatioFigure(axis=axis(values), lines=tuple(reversed(lines)), rows=rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStrip:
    """The blocks of one stage in the order of computation.

    Attributes:
        blocks: `name`, `state`, and whether `kept` in higher precision.
        names: of those that are computed, shortened: `0–3, 7`.
    """

    name: str
    blocks: tuple[Mapping[str, Any], ...]
    alive: int
    names: str


def stage_strips(report: Report) -> list[StageStrip]:
    higher = set(report["precision"]["kept"])
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for block in report["blocks"]["map"]:
        marked = {**block, "kept": block["name"] in higher}
        stages.setdefault(block["stage"], []).append(marked)
    strips = []
    for name, blocks in stages.items():
        alive = [block["name"].removeprefix(f"{name}.") for block in blocks if _alive(block)]
        strips.append(
            StageStrip(name=name, blocks=tuple(blocks), alive=len(alive), names=ranges(alive))
        )
    return strips


def _alive(block: Mapping[str, Any]) -> bool:
    return bool(block["state"] == "alive")


def ranges(names: list[str]) -> str:
    """`0–3, 7` for ["0", "1", "2", "3", "7"]; names that are no numbers stand for themselves."""
    if not names:
        return "none"
    parts: list[tuple[str, str]] = []
    for name in names:
        follows = (parts and name.isdecimal() and parts[-1][1].isdecimal()) and int(name) == int(
            parts[-1][1]
        ) + 1
        if follows:
            parts[-1] = (parts[-1][0], name)
        else:
            parts.append((name, name))
    return ", ".join(first if first == last else f"{first}–{last}" for first, last in parts)


_TEMPLATE = "report.html.j2"
_STYLE = "report.css"
_STATES = {True: "passed", False: "failed", None: "waiting"}
_HEADLINES = {True: "Passed", False: "Failed", None: "Not judged yet"}


def render_html(report: Report) -> str:
    """The text of `report.html` for the data of `report.json`."""
    environment = _environment()
    # Not rendered, and so no markup of a template: what it is hashed as, it is served as.
    source, _, _ = environment.loader.get_source(environment, _STYLE)  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    drop = drop_figure(report)
    return environment.get_template(_TEMPLATE).render(
        report=report,
        style=Markup(source),
        style_hash=f"sha256-{digest}",
        states=_STATES,
        headline=_HEADLINES[report["passed"]],
        sentence=verdict_sentences(report),
        subtitle=subtitle(report),
        facts=_facts(report),
        goals=goals(report),
        accuracies=ACCURACIES,
        sizes=SIZES,
        percentiles=PERCENTILES,
        removed=removed,
        drop=drop,
        drop_tone=_tone(report),
        drop_sentences=drop_sentences(report["accuracy"]),
        ratio=ratio_figure(report),
        times=times_figures(report),
        latency_notes=latency_notes(report),
        strips=stage_strips(report),
        block_states={block["state"] for block in report["blocks"]["map"]},
        precision_rows=precision_rows(report),
        environment_rows=environment_rows(report),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("eps_deploy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "capital": capital,
        "check_title": check_title,
        "comparisons": comparisons,
        "difference": difference,
        "limit": limit,
        "ms": milliseconds,
        "outcome": outcome,
        "percent": percent,
        "rate": rate,
        "ratio": ratio,
        "signed": signed,
        "stage": stage_name,
    }
    return environment


def _tone(report: Report) -> str:
    """Colour of the drop: that of its check, or doubt where there are too few images to tell."""
    for check in report["checks"]:
        if check["name"] == "accuracy":
            return _STATES[check["passed"] if check["conclusive"] or not check["passed"] else None]
    return "waiting"


def _facts(report: Report) -> list[tuple[str, str, str]]:
    """The few numbers that people look for: title, the number, what it means."""
    accuracy, blocks = report["accuracy"], report["blocks"]
    drop = accuracy["drop"]
    facts = []
    for entry in report["latency"]:
        speedup = entry["speedup"]
        facts.append(
            (
                f"Speed-up, batch {entry['batch']}",
                f"{speedup['median']:.2f}×",
                f"{speedup['low']:.2f} to {speedup['high']:.2f}: {entry['verdict']}",
            )
        )
    judged = accuracy[accuracy["judged"]]
    facts += [
        (
            "Accuracy",
            percent(judged),
            change(drop["points"]) if drop else "no trained unpruned network to compare with",
        ),
        (
            "Residual blocks",
            f"{blocks['compact']} of {blocks['baseline']}",
            f"{blocks['baseline'] - blocks['compact']} removed",
        ),
    ]
    for key, title in (("parameters", "Parameters"), ("flops", "FLOPs for one image")):
        old, new = report[key]["baseline"], report[key]["compact"]
        small = f"of {short(old)}: {removed(old, new)} less"
        facts.append((title, short(new), small))
    return facts


# -- `report.md`: the report for people, the verdict first


def render_markdown(report: Report) -> str:
    """The text of `report.md` for the data of `report.json`."""
    sections = (
        _verdict(report),
        _size(report),
        _accuracy(report),
        _latency(report),
        _blocks(report),
        _parity(report),
        _precision(report),
        _not_run(report),
        _markdown_environment(report),
    )
    return "\n\n".join(sections) + "\n"


def _verdict(report: Report) -> str:
    rows = [
        (
            _plain(check["name"]),
            "passed" if check["passed"] else "**FAILED**",
            _plain(check["text"]),
        )
        for check in report["checks"]
    ]
    line = _plain(capital(verdict_line(report)))
    text = f"# Deployment report\n\n**{line}.**\n\n{_plain(subtitle(report))}\n\n"
    return text + _table(("check", "outcome", "measured"), rows) + f"\n\n{goals(report)}"


def _size(report: Report) -> str:
    rows = [
        (title, f"{old:,}", f"{new:,}", removed(old, new))
        for key, title in SIZES.items()
        for old, new in [(report[key]["baseline"], report[key]["compact"])]
    ]
    return "## Size\n\n" + _table(("", "unpruned", "compact", "removed"), rows)


def _accuracy(report: Report) -> str:
    found = report["accuracy"]
    rows = [
        (title + (" (judged)" if key == found["judged"] else ""), percent(found[key]))
        for key, title in ACCURACIES.items()
    ]
    text = f"## Accuracy\n\nOn all {found['samples']:,} images of the test part.\n\n"
    text += _table(("", "accuracy"), rows)
    return text + "\n\n" + _plain(" ".join(drop_sentences(found)))


def _latency(report: Report) -> str:
    if not report["latency"]:
        return "## Latency\n\nNot measured."
    rows = []
    for entry in report["latency"]:
        for timed, found in comparisons(entry):
            for title in ("baseline", "compact"):
                times = [milliseconds(found[f"{title}_ms"][p]) for p in PERCENTILES]
                if not entry["p99_reliable"]:
                    times[-1] += " (unreliable)"
                compact = title == "compact"
                rows.append(
                    (
                        str(entry["batch"]),
                        timed,
                        "compact" if compact else "unpruned",
                        *times,
                        rate(found["throughput"][title]),
                        f"{ratio(found['speedup'])}: {found['verdict']}" if compact else "",
                    )
                )
    columns = ("batch", "timed", "network", *PERCENTILES, "images/s", "speed-up")
    text = (
        "## Latency\n\nMilliseconds. Speed-up: median of the ratios of blocks measured beside each"
        ' other, with its 95 % interval; "faster" and "slower" only when all of that lies'
        f" {100 * LEAST:.0f} % or more from 1.\n\n"
    )
    return text + _table(columns, rows) + "\n\n" + _list(latency_notes(report))


def _blocks(report: Report) -> str:
    blocks = report["blocks"]
    stages: dict[str, list[str]] = {}
    signs = {"alive": "■", "dead": "·", "removed": "×"}
    for block in blocks["map"]:
        stages.setdefault(block["stage"], []).append(signs[block["state"]])
    rows = [
        (_plain(stage), f"{row.count('■')} of {len(row)}", f"`{''.join(row)}`")
        for stage, row in stages.items()
    ]
    text = "## Blocks\n\n" + _table(("stage", "kept", "■ kept, · dead, × removed alive"), rows)
    if not report["lossless"]:
        text += "\n\nLive blocks were removed too: this is not lossless."
    return text


def _parity(report: Report) -> str:
    if not report["parity"]:
        return "## Chain of proof\n\nNot run."
    rows = [
        (
            _plain(stage_name(stage["stage"])),
            outcome(stage["passed"]),
            difference(stage["max_abs"]),
            "" if stage["relative"] is None else difference(stage["relative"]),
            limit(stage["limit"]),
            percent(stage["top1_agreement"]),
            f"{stage['worst_sample']} (batch {stage['worst_batch']})",
        )
        for stage in report["parity"]
    ]
    first = report["parity"][0]
    batches = ", ".join(str(batch) for batch in first["batches"])
    columns = (
        "stage",
        "outcome",
        "largest difference",
        "relative",
        "limit",
        "same class",
        "worst image",
    )
    return (
        f"## Chain of proof\n\nLogits of {first['samples']} test images at batches {batches};"
        " relative: to the largest logit.\n\n"
    ) + _table(columns, rows)


def _precision(report: Report) -> str:
    rows = [f"{capital(title)}: {text}" for title, text in precision_rows(report)]
    return "## Precision\n\n" + _list(rows)


def _not_run(report: Report) -> str:
    lines = [f"{entry['what']}: {entry['why']}" for entry in report["not_run"]]
    return "## Not run\n\n" + (_list(lines) or "Nothing was left out.")


def _markdown_environment(report: Report) -> str:
    rows = [f"{title}: {text}" for title, text in environment_rows(report)]
    return "## Environment\n\n" + _list(rows)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text on one line that is no markup, whatever names stand in it."""
    for sign, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("`", "\\`")):
        text = text.replace(sign, escaped)
    return " ".join(text.split())
