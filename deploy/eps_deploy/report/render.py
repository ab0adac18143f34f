"""`report.md` and `report.html`, rendered from the data of `report.json`.

Both templates have the functions of `formatting` as filters. Names and messages from outside
(classes, blocks, the command line) are escaped in both. The page needs no network: its own content
security policy lets it run nothing, and load nothing but the images that it contains.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from inspect import getmembers, isfunction
from types import MappingProxyType
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from eps_core.formatting import milliseconds
from eps_deploy.bench.latency import LEAST
from eps_deploy.report import charts, formatting
from eps_deploy.report.schema import Report, parse

_LARGEST = 160  # pixels of an image on the page, in width and height
_STATES = {True: "passed", False: "failed", None: "waiting"}
_HEADLINES = {True: "Passed", False: "Failed", None: "Not judged yet"}


def render_markdown(report: Mapping[str, Any]) -> str:
    """Render `report.md`, the verdict first, from the data of `report.json`."""
    template = _environment(finalize=_escape_markdown).get_template("report.md.j2")
    return template.render(report=parse(report), least=LEAST)


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
        (entry, title, times)
        for entry in found.latency
        for title, times in formatting.comparisons(entry)
    ]
    speedups = [(f"batch {entry.batch}, {title}", times) for entry, title, times in timed]
    return environment.get_template("report.html.j2").render(
        report=found,
        style=Markup(style),
        style_hash=f"sha256-{digest}",
        states=_STATES,
        headline=_HEADLINES[found.passed],
        thumbnails={name: _thumbnail(content) for name, content in images.items()},
        class_chart=charts.class_chart(found, formatting.listed_classes(found)),
        drop_chart=charts.drop_chart(found, _drop_tone(found)),
        speedup_chart=charts.speedup_chart(found, speedups),
        times_charts=[(e.batch, title, charts.times_chart(e, title, t)) for e, title, t in timed],
    )


def verdict_line(report: Mapping[str, Any]) -> str:
    """The outcome of the data of `report.json` in one line."""
    return formatting.verdict_line(parse(report))


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
    environment.filters.update(getmembers(formatting, isfunction), milliseconds=milliseconds)
    environment.globals.update(accuracies=formatting.ACCURACIES, percentiles=formatting.PERCENTILES)
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
