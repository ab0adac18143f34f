"""`report.md`: the report for people, the verdict first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from eps_deploy.measuring.latency import LEAST
from eps_deploy.reporting import words
from eps_deploy.reporting.words import PERCENTILES, Report, verdict_line

__all__ = ["render", "verdict_line"]


def render(report: Report) -> str:
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
        _environment(report),
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
    line = _plain(words.capital(verdict_line(report)))
    text = f"# Deployment report\n\n**{line}.**\n\n{_plain(words.subtitle(report))}\n\n"
    return text + _table(("check", "outcome", "measured"), rows) + f"\n\n{words.goals(report)}"


def _size(report: Report) -> str:
    rows = [
        (title, f"{old:,}", f"{new:,}", words.removed(old, new))
        for key, title in words.SIZES.items()
        for old, new in [(report[key]["baseline"], report[key]["compact"])]
    ]
    return "## Size\n\n" + _table(("", "unpruned", "compact", "removed"), rows)


def _accuracy(report: Report) -> str:
    found = report["accuracy"]
    rows = [
        (title + (" (judged)" if key == found["judged"] else ""), words.percent(found[key]))
        for key, title in words.ACCURACIES.items()
    ]
    text = f"## Accuracy\n\nOn all {found['samples']:,} images of the test part.\n\n"
    text += _table(("", "accuracy"), rows)
    return text + "\n\n" + _plain(" ".join(words.drop_sentences(found)))


def _latency(report: Report) -> str:
    if not report["latency"]:
        return "## Latency\n\nNot measured."
    rows = []
    for entry in report["latency"]:
        for timed, found in words.comparisons(entry):
            for title in ("baseline", "compact"):
                times = [words.milliseconds(found[f"{title}_ms"][p]) for p in PERCENTILES]
                if not entry["p99_reliable"]:
                    times[-1] += " (unreliable)"
                compact = title == "compact"
                rows.append(
                    (
                        str(entry["batch"]),
                        timed,
                        "compact" if compact else "unpruned",
                        *times,
                        words.rate(found["throughput"][title]),
                        f"{words.ratio(found['speedup'])}: {found['verdict']}" if compact else "",
                    )
                )
    columns = ("batch", "timed", "network", *PERCENTILES, "images/s", "speed-up")
    text = (
        "## Latency\n\nMilliseconds. Speed-up: median of the ratios of blocks measured beside each"
        ' other, with its 95 % interval; "faster" and "slower" only when all of that lies'
        f" {100 * LEAST:.0f} % or more from 1.\n\n"
    )
    return text + _table(columns, rows) + "\n\n" + _list(words.latency_notes(report))


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
            _plain(words.stage(stage["stage"])),
            words.outcome(stage["passed"]),
            words.difference(stage["max_abs"]),
            "" if stage["relative"] is None else words.difference(stage["relative"]),
            words.limit(stage["limit"]),
            words.percent(stage["top1_agreement"]),
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
    rows = [f"{words.capital(title)}: {text}" for title, text in words.precision_rows(report)]
    return "## Precision\n\n" + _list(rows)


def _not_run(report: Report) -> str:
    lines = [f"{entry['what']}: {entry['why']}" for entry in report["not_run"]]
    return "## Not run\n\n" + (_list(lines) or "Nothing was left out.")


def _environment(report: Report) -> str:
    rows = [f"{title}: {text}" for title, text in words.environment_rows(report)]
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
