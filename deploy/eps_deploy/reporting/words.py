"""What `report.md` and `report.html` say in the same words: names, numbers, sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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


def stage(name: str) -> str:
    return STAGES.get(name, name)


def check_title(name: str) -> str:
    """What a check is about, in words."""
    prefix, _, rest = name.partition("parity-")
    if not prefix and rest:
        return f"{_SAME}{stage(rest)}"
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
