"""`report.html`: the report as one page that needs no network, on a screen, a phone or paper.

Everything that comes from outside (names of classes and blocks, messages, the command line) is
escaped, and the page's own content security policy lets it run and load nothing.
"""

from __future__ import annotations

import base64
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from eps_deploy.reporting import figures, words
from eps_deploy.reporting.words import Report

_TEMPLATE = "report.html.j2"
_STYLE = "report.css"
_STATES = {True: "passed", False: "failed", None: "waiting"}
_HEADLINES = {True: "Passed", False: "Failed", None: "Not judged yet"}


def render(report: Report) -> str:
    """The text of `report.html` for the data of `report.json`."""
    environment = _environment()
    # Not rendered, and so no markup of a template: what it is hashed as, it is served as.
    source, _, _ = environment.loader.get_source(environment, _STYLE)  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    drop = figures.drop_figure(report)
    return environment.get_template(_TEMPLATE).render(
        report=report,
        style=Markup(source),
        style_hash=f"sha256-{digest}",
        states=_STATES,
        headline=_HEADLINES[report["passed"]],
        sentence=words.verdict_sentences(report),
        subtitle=words.subtitle(report),
        facts=_facts(report),
        goals=words.goals(report),
        accuracies=words.ACCURACIES,
        sizes=words.SIZES,
        percentiles=words.PERCENTILES,
        removed=words.removed,
        drop=drop,
        drop_tone=_tone(report),
        drop_sentences=words.drop_sentences(report["accuracy"]),
        ratio=figures.ratio_figure(report),
        times=figures.times_figures(report),
        latency_notes=words.latency_notes(report),
        strips=figures.stage_strips(report),
        block_states={block["state"] for block in report["blocks"]["map"]},
        precision_rows=words.precision_rows(report),
        environment_rows=words.environment_rows(report),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("eps_deploy.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "capital": words.capital,
        "check_title": words.check_title,
        "comparisons": words.comparisons,
        "difference": words.difference,
        "limit": words.limit,
        "ms": words.milliseconds,
        "outcome": words.outcome,
        "percent": words.percent,
        "rate": words.rate,
        "ratio": words.ratio,
        "signed": words.signed,
        "stage": words.stage,
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
            words.percent(judged),
            words.change(drop["points"]) if drop else "no trained unpruned network to compare with",
        ),
        (
            "Residual blocks",
            f"{blocks['compact']} of {blocks['baseline']}",
            f"{blocks['baseline'] - blocks['compact']} removed",
        ),
    ]
    for key, title in (("parameters", "Parameters"), ("flops", "FLOPs for one image")):
        old, new = report[key]["baseline"], report[key]["compact"]
        small = f"of {words.short(old)}: {words.removed(old, new)} less"
        facts.append((title, words.short(new), small))
    return facts
