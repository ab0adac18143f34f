"""`report.md`: the report for people, the verdict first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_STAGES = {
    "gated-compact": "gated network → compact network (torch)",
    "compact-onnx": "compact network (torch) → model.onnx",
    "baseline-onnx": "baseline (torch) → baseline.onnx",
}


def render(report: dict[str, Any]) -> str:
    """The text of `report.md` for the data of `report.json`."""
    sections = (
        _verdict(report),
        _size(report),
        _accuracy(report),
        _latency(report),
        _parity(report),
        _not_run(report),
        _environment(report),
    )
    return "\n\n".join(sections) + "\n"


def verdict_line(report: dict[str, Any]) -> str:
    """The outcome in one sentence."""
    checks = report["checks"]
    failed = [check["name"] for check in checks if not check["passed"]]
    if failed:
        return f"FAILED: {', '.join(failed)} ({len(failed)} of {len(checks)} checks)"
    unsure = [check["name"] for check in checks if not check["conclusive"]]
    line = f"passed: all {len(checks)} checks"
    if unsure:
        line += f" (too few images to be sure: {', '.join(unsure)})"
    if report["not_run"]:
        line += f"; not run: {', '.join(entry['what'] for entry in report['not_run'])}"
    return line


def _verdict(report: dict[str, Any]) -> str:
    rows = [
        (check["name"], "passed" if check["passed"] else "**FAILED**", check["text"])
        for check in report["checks"]
    ]
    return f"# Deployment report\n\n**{_capital(verdict_line(report))}.**\n\n" + _table(
        ("check", "outcome", "measured"), rows
    )


def _size(report: dict[str, Any]) -> str:
    rows = [
        (title, f"{old:,}", f"{new:,}", f"{100 * (1 - new / old):.1f} %")
        for title, key in (
            ("residual blocks", "blocks"),
            ("parameters", "parameters"),
            ("FLOPs per image", "flops"),
        )
        for old, new in [(report[key]["baseline"], report[key]["compact"])]
    ]
    return "## Size\n\n" + _table(("", "baseline", "compact", "removed"), rows)


def _accuracy(report: dict[str, Any]) -> str:
    found = report["accuracy"]
    rows = [
        (title, _percent(found[key]))
        for title, key in (
            ("trained baseline (torch)", "baseline"),
            ("compact network (torch)", "compact"),
            ("engine (model.onnx)", "engine"),
        )
    ]
    text = f"## Accuracy\n\nOn all {found['samples']} images of the test part.\n\n"
    text += _table(("", "accuracy"), rows)
    drop = found["drop"]
    if drop is not None:
        text += (
            f"\n\nDrop from baseline to engine: {drop['points']:+.2f} percentage points, 95 %"
            f" interval {drop['low']:+.2f} to {drop['high']:+.2f} ({drop['method']};"
            f" {drop['only_baseline_right']} images only the baseline got right,"
            f" {drop['only_engine_right']} only the engine)."
        )
        if not drop["conclusive"]:
            text += (
                " The interval reaches across the limit: there are too few images to tell for sure,"
                " and the check judges the measured drop."
            )
    return text


def _latency(report: dict[str, Any]) -> str:
    percentiles = ("p50", "p90", "p95", "p99")
    rows = []
    for entry in report["latency"]:
        for title, key in (("baseline", "baseline_ms"), ("compact", "compact_ms")):
            times = [f"{entry[key][p]:.3f}" for p in percentiles]
            if not entry["p99_reliable"]:
                times[-1] += " (unreliable)"
            speedup = entry["speedup"]
            ratio = f"{speedup['median']:.2f} ({speedup['low']:.2f} to {speedup['high']:.2f})"
            rows.append((str(entry["batch"]), title, *times, ratio if key == "compact_ms" else ""))
    flops = report["flops"]
    text = (
        f"## Latency\n\nMilliseconds a call; the baseline is the {report['latency_baseline']}."
        " Speed-up: ratio of the medians with its 95 % bootstrap interval.\n\n"
    )
    text += _table(("batch", "network", *percentiles, "speed-up"), rows)
    notes = [
        f"Ratio of the FLOPs: {flops['baseline'] / flops['compact']:.2f}.",
        *(
            f"Batch {entry['batch']}: {entry['blocks']} blocks of {entry['runs_per_block']} runs of"
            " each network, alternating."
            + ("" if entry["warm"] else " The warm-up did not become flat in its time.")
            + ("" if entry["p99_reliable"] else " Fewer than 200 runs: p99 is unreliable.")
            for entry in report["latency"]
        ),
    ]
    return text + "\n\n" + "\n".join(f"- {note}" for note in notes)


def _parity(report: dict[str, Any]) -> str:
    rows = []
    for stage in report["parity"]:
        worst = "not finite" if stage["max_abs"] is None else f"{stage['max_abs']:.3g}"
        relative = "" if stage["relative"] is None else f"{stage['relative']:.2g}"
        limit = "equal" if stage["limit"] == 0 else f"{stage['limit']:g}"
        rows.append(
            (
                _STAGES[stage["stage"]],
                worst,
                relative,
                limit,
                _percent(stage["top1_agreement"]),
                f"{stage['worst_sample']} (batch {stage['worst_batch']})",
            )
        )
    first = report["parity"][0]
    batches = ", ".join(str(batch) for batch in first["batches"])
    return (
        f"## Chain of proof\n\nLogits of {first['samples']} test images at batches {batches};"
        " relative: to the largest logit.\n\n"
    ) + _table(
        ("stage", "largest difference", "relative", "limit", "same class", "worst image"), rows
    )


def _not_run(report: dict[str, Any]) -> str:
    lines = [f"- {entry['what']}: {entry['why']}" for entry in report["not_run"]]
    return "## Not run\n\n" + ("\n".join(lines) or "Nothing was left out.")


def _environment(report: dict[str, Any]) -> str:
    facts = report["environment"]
    engine = facts["engine"]
    packages = (f"{name} {version}" for name, version in facts["packages"].items() if version)
    lines = (
        f"Engine: {engine['runtime']} {engine['version']}, {engine['provider']},"
        f" {engine['threads']} thread{'s' if engine['threads'] > 1 else ''}",
        f"Processor: {facts['processor']}, {facts['cores']} cores",
        f"System: {facts['system']}, Python {facts['python']}",
        f"Packages: {', '.join(packages)}",
    )
    return "## Environment\n\n" + "\n".join(f"- {line}" for line in lines)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.2f} %"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
