"""`report.md` and `report.html`, rendered from the data of `report.json`.

Both templates get the same rows and filters. Names and messages from outside (classes, blocks, the
command line) are escaped in both. The page needs no network: its own content security policy lets
it run nothing, and load nothing but the images that it contains.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from eps_core.cli import milliseconds
from eps_deploy.bench.latency import LEAST
from eps_deploy.report import charts, formatting
from eps_deploy.report.schema import Report, parse

_LARGEST = 160  # pixels of an image on the page, in width and height
_STATES = {True: "passed", False: "failed", None: "waiting"}
_HEADLINES = {True: "Passed", False: "Failed", None: "Not judged yet"}
_FILTERS = (
    formatting.capital,
    formatting.check_title,
    formatting.comparisons,
    formatting.difference,
    formatting.integer,
    formatting.limit,
    milliseconds,
    formatting.outcome,
    formatting.paired,
    formatting.percent,
    formatting.predicted,
    formatting.ratio,
    formatting.signed,
    formatting.stage_name,
    formatting.throughput,
)


def render_markdown(report: Mapping[str, Any]) -> str:
    """Render `report.md`, the verdict first.

    Args:
        report: the data of `report.json`.
    """
    found = parse(report)
    template = _environment(finalize=_escape_markdown).get_template("report.md.j2")
    return template.render(_context(found), verdict=formatting.verdict_line(found), least=LEAST)


def render_html(
    report: Mapping[str, Any], images: Mapping[str, bytes] = MappingProxyType({})
) -> str:
    """Render `report.html`, one page with its style, charts and images inside.

    Args:
        report: the data of `report.json`.
        images: the PNG files that `changed` names; an image that is missing is not shown.
    """
    found = parse(report)
    environment = _environment(autoescape=True)
    # Taken as it is, not rendered, so that its digest is that of what the page contains.
    style, _, _ = environment.loader.get_source(environment, "report.css")  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    timed = [
        (entry, title, comparison)
        for entry in found.latency
        for title, comparison in formatting.comparisons(entry)
    ]
    speedups = [(f"batch {entry.batch}, {title}", times) for entry, title, times in timed]
    return environment.get_template("report.html.j2").render(
        _context(found),
        style=Markup(style),
        style_hash=f"sha256-{digest}",
        states=_STATES,
        headline=_HEADLINES[found.passed],
        sentence=formatting.verdict_sentences(found),
        facts=formatting.facts(found),
        thumbnails={name: _thumbnail(content) for name, content in images.items()},
        class_chart=charts.class_chart(found, formatting.listed_classes(found)),
        drop_chart=charts.drop_chart(found, _drop_tone(found)),
        speedup_chart=charts.speedup_chart(found, speedups),
        times_charts=[(e.batch, title, charts.times_chart(e, title, c)) for e, title, c in timed],
    )


def verdict_line(report: Mapping[str, Any]) -> str:
    """The outcome of the data of `report.json` in one line."""
    return formatting.verdict_line(parse(report))


def _context(report: Report) -> dict[str, Any]:
    return {
        "report": report,
        "subtitle": formatting.subtitle(report),
        "goals": formatting.goals(report),
        "sizes": formatting.sizes(report),
        "removed": formatting.removed,
        "accuracies": formatting.ACCURACIES,
        "percentiles": formatting.PERCENTILES,
        "answer_rows": formatting.answer_rows(report),
        "classes": formatting.listed_classes(report),
        "class_notes": formatting.class_notes(report),
        "confusions": formatting.listed_confusions(report),
        "gallery": formatting.gallery(report.answers.changed or []),
        "changed_sentences": formatting.changed_sentences(report),
        "drop_sentences": formatting.drop_sentences(report),
        "latency_notes": formatting.latency_notes(report),
        "strips": formatting.stage_strips(report),
        "precision_rows": formatting.precision_rows(report),
        "environment_rows": formatting.environment_rows(report),
    }


class _Thumbnail(NamedTuple):
    """An image of the page: its `data:` URL, its size, and whether its pixels are to be seen."""

    url: str
    width: int
    height: int
    coarse: bool


def _thumbnail(content: bytes) -> _Thumbnail:
    """A PNG file, reduced where it is large."""
    with Image.open(io.BytesIO(content)) as image:
        if max(image.size) > _LARGEST:
            image.thumbnail((_LARGEST, _LARGEST))
            file = io.BytesIO()
            image.save(file, "PNG")
            content = file.getvalue()
        width, height = image.size
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return _Thumbnail(url, width, height, max(width, height) < _LARGEST / 2)


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=PackageLoader("eps_deploy.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    environment.filters |= {function.__name__: function for function in _FILTERS}
    return environment


def _escape_markdown(value: object) -> str:
    """`value` on one line, without characters that Markdown would interpret."""
    text = str(value)
    for sign, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("`", "\\`")):
        text = text.replace(sign, escaped)
    return " ".join(text.split())


def _drop_tone(report: Report) -> str:
    """State of the accuracy check, `waiting` also if it passed with too few images to be sure."""
    for check in report.checks:
        if check.name == "accuracy":
            return _STATES[None if check.passed and not check.conclusive else check.passed]
    return "waiting"
