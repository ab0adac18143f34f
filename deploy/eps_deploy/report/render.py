"""`report.md` and `report.html`, rendered from the data of `report.json`.

Both templates have the functions of `formatting` as filters. Names and messages from outside
(classes, blocks, the command line) are escaped in both. The page needs no network: its own content
security policy lets it run nothing, and load nothing but the images that it contains.

matplotlib draws the charts as inline SVG. The page's policy ignores inline styles, and colours
depend on light or dark mode: so only shapes and text are kept of matplotlib's output, and the
classes set here get their colours, strokes and fonts from `report.css`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from inspect import getmembers, isfunction
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from eps_core.cli import milliseconds
from eps_deploy.bench.latency import LEAST
from eps_deploy.report import formatting
from eps_deploy.report.formatting import paired, ratio, signed
from eps_deploy.report.schema import ComparisonEntry, LatencyEntry, Report, parse

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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

    `images` are the PNG files that `changed` names; an image that is missing is not shown.
    """
    found = parse(report)
    environment = _environment(autoescape=True)
    # Taken as it is, not rendered, so that its digest is that of what the page contains.
    style, _, _ = environment.loader.get_source(environment, "report.css")  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        report=found,
        style=Markup(style),
        style_hash=f"sha256-{digest}",
        states=_STATES,
        headline=_HEADLINES[found.passed],
        thumbnails={name: _thumbnail(content) for name, content in images.items()},
    )


def verdict_line(report: Mapping[str, Any]) -> str:
    """The outcome of the data of `report.json` in one line."""
    return formatting.verdict_line(parse(report))


def _thumbnail(content: bytes) -> dict[str, Any]:
    """A PNG file as the page shows it, reduced where it is large; coarse: its pixels are seen."""
    with Image.open(io.BytesIO(content)) as image:
        if max(image.size) > _LARGEST:
            image.thumbnail((_LARGEST, _LARGEST))
            file = io.BytesIO()
            image.save(file, "PNG")
            content = file.getvalue()
        width, height = image.size
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    coarse = max(width, height) < _LARGEST / 2
    return {"url": url, "width": width, "height": height, "coarse": coarse}


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=PackageLoader("eps_deploy.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    for function in (class_chart, drop_chart, milliseconds, speedup_chart, times_chart):
        environment.filters[function.__name__] = function
    environment.filters.update(getmembers(formatting, isfunction))
    environment.globals.update(accuracies=formatting.ACCURACIES, percentiles=formatting.PERCENTILES)
    return environment


def _escape_markdown(value: object) -> str:
    """`value` on one line, without characters that Markdown would interpret."""
    text = str(value)
    for sign, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("`", "\\`")):
        text = text.replace(sign, escaped)
    return " ".join(text.split())


# -- Charts

# Lengths are in points, which are the units of matplotlib's SVG.
_WIDTH = 440
_MARGIN = 22  # on both sides, for the labels of the outermost ticks
_FOOT = 24  # below, for the labels of the ticks
_FAR = 3.0  # a limit is drawn up to so many times the span of the measured values away
_ROW = 40  # of one class
_NAME = 32  # characters of a class's name
_TAIL = 3.0  # in times of the longer median; a longer scale would leave no room for the medians
_CLASS = "chart-"
_TONES = {"faster": "passed", "slower": "failed", "cannot tell": "waiting"}


def drop_chart(report: Report) -> Markup | None:
    """Draw the drop in accuracy against its limit, in percentage points; None without a drop."""
    drop = report.accuracy.drop
    if drop is None:
        return None
    values = [0.0, drop.points, drop.low, drop.high]
    limit = report.goals.max_accuracy_drop
    # On one scale with the interval, a limit that is far away would squeeze it.
    shown = limit <= max(values) + _FAR * max(max(values) - min(values), 0.05)
    axes = _axes(112, [*values, limit] if shown else values, top=22)
    _vertical(axes, 0.0, "zero", top=22)
    label = f"Drop of {signed(drop.points)} percentage points, 95 % interval {signed(drop.low)}"
    label += f" to {signed(drop.high)}"
    if shown:
        label += f", limit {limit:g}"
        axes.fill_betweenx([22, 88], limit, axes.get_xlim()[1], gid=f"{_CLASS}beyond")
        _vertical(axes, limit, "goal", top=22)
        _text(axes, limit, 15, f"limit {limit:g}", "goal")
    text = f"{signed(drop.points)} ({signed(drop.low)} to {signed(drop.high)})"
    _text(axes, drop.points, 48, text, "strong")
    sure = (  # passed with too few images is `waiting`
        check.passed
        for check in report.checks
        if check.name == "accuracy" and (check.conclusive or not check.passed)
    )
    _interval(axes, drop.low, drop.points, drop.high, 66, _STATES[next(sure, None)])
    return _svg(axes, label)


def class_chart(report: Report) -> Markup | None:
    """Draw the drop of each class with its interval, in percentage points; None without drops.

    With a limit for classes, a thin line leads to the lower end that the check judges.
    """
    rows = [(c.name, c.drop) for c in formatting.listed_classes(report) if c.drop]
    if not rows:
        return None
    limit = report.goals.max_class_drop
    values = [0.0, *(end for _, drop in rows for end in (drop.low, drop.high))]
    if limit is not None:
        values += [limit, *(drop.at_least for _, drop in rows)]
    top = 6 if limit is None else 22
    axes = _axes(top + _ROW * len(rows) + _FOOT, values, top=top)
    _vertical(axes, 0.0, "zero", top=top)
    if limit is not None:
        _vertical(axes, limit, "goal", top=top)
        _text(axes, limit, 15, f"limit {limit:g}", "goal")
    for index, (name, drop) in enumerate(rows):
        y = top + _ROW * index
        shown = name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
        _text(axes, axes.get_xlim()[0], y + 16, f"{shown}: {paired(drop)}", "label")
        tone = "reported"
        if limit is not None:
            _line(axes, (drop.at_least, drop.low), (y + 29, y + 29), "whisker")
            doubt = "waiting" if drop.high > limit else "passed"
            tone = "failed" if drop.at_least > limit else doubt
        _interval(axes, drop.low, drop.points, drop.high, y + 29, tone)
    name, drop = rows[0]
    label = f"Drop in accuracy of {len(rows)} classes, in percentage points; most: {name},"
    return _svg(axes, f"{label} {paired(drop)}. The table has all numbers.")


def speedup_chart(report: Report) -> Markup | None:
    """Draw speed-ups with their intervals; None without any.

    Lines show the ratio of the FLOPs and the goal, unless they are too far away to be drawn.
    """
    rows = [
        (f"batch {entry.batch}, {title}", times)
        for entry in report.latency
        for title, times in formatting.comparisons(entry)
    ]
    if not rows:
        return None
    speedups = [found.speedup for _, found in rows]
    values = [1.0, *(end for speedup in speedups for end in (speedup.low, speedup.high))]
    farthest = max(values) + _FAR * (max(values) - min(values)) + 0.1
    flops = report.flops.baseline / max(report.flops.compact, 1)
    goal = report.goals.min_speedup
    lines = [("one", "1: as fast", 1.0)]
    if flops <= farthest:
        lines.insert(0, ("flops", f"FLOPs {flops:.2f}", flops))
    if 0 < goal <= farthest and goal != 1:
        lines.insert(0, ("goal", f"goal {goal:g}", goal))
    top = 18 * len(lines) + 6
    height = top + 6 + 70 * len(rows) + _FOOT
    axes = _axes(height, [*values, *(value for _, _, value in lines)], top=top)
    left = axes.get_xlim()[0]
    label = "Speed-up."
    for index, (kind, text, value) in enumerate(lines):
        _vertical(axes, value, kind, top=18 + 18 * index)
        _text(axes, value, 14 + 18 * index, text, kind)
    for index, (title, found) in enumerate(rows):
        y = top + 6 + 70 * index
        _text(axes, left, y + 14, title, "label")
        _text(axes, left, y + 33, f"{ratio(found.speedup)}: {found.verdict}", "strong")
        speedup = found.speedup
        _interval(axes, speedup.low, speedup.median, speedup.high, y + 52, _TONES[found.verdict])
        label += f" {title}: {ratio(speedup)}, {found.verdict}."
    return _svg(axes, label + "".join(f" Line: {text}." for _, text, _ in reversed(lines)))


def times_chart(entry: LatencyEntry, title: str, found: ComparisonEntry) -> Markup:
    """Draw the times of both networks: the median as a bar, p90, p95 and p99 as marks.

    Marks beyond the end of the scale are left out; such a p99 is written there.
    """
    rows = {"unpruned": found.baseline_ms, "compact": found.compact_ms}
    longest = max(times.p99 for times in rows.values())
    median = max(times.p50 for times in rows.values())
    axes = _axes(140, [0.0, min(longest, _TAIL * median)], top=0)
    end = axes.get_xlim()[1]
    reliable = "" if entry.p99_reliable else " unsure"
    parts = []
    for index, (name, times) in enumerate(rows.items()):
        y = 4 + 54 * index
        _text(axes, 0.0, y + 13, f"{name} {milliseconds(times.p50)}", "label")
        axes.barh(y + 30, times.p50, height=20, gid=f"{_CLASS}bar {name}")
        _line(axes, (times.p50, min(times.p99, end)), (y + 30, y + 30), f"whisker{reliable}")
        for percentile, half in (("p90", 4), ("p95", 6), ("p99", 9)):
            value = getattr(times, percentile)
            if value <= end:
                unsure = reliable if percentile == "p99" else ""
                _line(axes, (value, value), (y + 30 - half, y + 30 + half), f"whisker{unsure}")
        if times.p99 > end:
            _text(axes, end, y + 13, f"p99 {milliseconds(times.p99)} →", "tick", align="right")
        parts.append(
            f"{name} median {milliseconds(times.p50)}, 99th percentile {milliseconds(times.p99)}"
        )
    return _svg(axes, f"Batch {entry.batch}, {title}: {'; '.join(parts)} milliseconds")


# -- Elements of the charts


def _axes(height: float, values: Sequence[float], *, top: float) -> Axes:
    """Axes with a scale for `values` and its grid from `top` down; y is in points from above."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    axes = figure.add_axes((_MARGIN / _WIDTH, 0.0, 1 - 2 * _MARGIN / _WIDTH, 1.0))
    axes.set_axis_off()
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(min(values), max(values))
    axes.set(xlim=(ticks[0], ticks[-1]), ylim=(height, 0), autoscale_on=False)
    for tick in ticks:
        _line(axes, (tick, tick), (top, height - _FOOT), "grid")
        label = f"{tick:g}".replace("-", "−")
        _text(axes, tick, height - 7, label, "tick", align="center")
    return axes


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], kind: str) -> None:
    axes.plot(x, y, gid=_CLASS + kind, zorder=0 if kind == "grid" else 2)


def _vertical(axes: Axes, value: float, kind: str, *, top: float) -> None:
    _line(axes, (value, value), (top, axes.get_ylim()[0] - _FOOT), kind)


def _text(
    axes: Axes, x: float, y: float, text: str, kind: str, *, align: str | None = None
) -> None:
    """Text on the baseline `y`; without `align`, on the side of `x` that has more room."""
    low, high = axes.get_xlim()
    share = (x - low) / (high - low)
    chosen: Any = align or ("left" if share < 0.2 else "right" if share > 0.8 else "center")
    axes.text(x, y, text, ha=chosen, gid=_CLASS + kind)


def _interval(axes: Axes, low: float, value: float, high: float, y: float, tone: str) -> None:
    _line(axes, (low, high), (y, y), f"range {tone}")
    for end in (low, high):
        _line(axes, (end, end), (y - 6, y + 6), f"cap {tone}")
    _line(axes, (value, value), (y, y), f"dot {tone}")  # a round cap makes it a dot


def _svg(axes: Axes, label: str) -> Markup:
    """The figure as an SVG element without styles, ids, definitions and metadata."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    content = io.BytesIO()
    figure = axes.figure
    assert isinstance(figure, Figure)
    with rc_context({"svg.fonttype": "none", "text.parse_math": False, "savefig.bbox": None}):
        figure.savefig(content, format="svg")
    root = ElementTree.fromstring(content.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}defs", "}style")):
                parent.remove(child)
    for element in root.iter():
        found = dict(element.attrib)
        kept: dict[str, str] = {}
        for name in ("d", "x", "y"):
            if name in found:
                kept[name] = _short(found[name])
        if found.get("id", "").startswith(_CLASS):
            kept["class"] = found["id"].removeprefix(_CLASS)
        if anchor := re.search(r"text-anchor: (\w+)", found.get("style", "")):
            kept["text-anchor"] = anchor[1]
        element.attrib.clear()
        element.attrib.update(kept)
        element.tag = element.tag.rpartition("}")[2]
        if element.tag != "text":
            element.text = None
        element.tail = None
    height = axes.get_ylim()[0]
    root.attrib.update({"class": "chart", "role": "img", "aria-label": label})
    root.attrib["viewBox"] = f"0 0 {_WIDTH} {height:g}"
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _short(numbers: str) -> str:
    """Coordinates with two decimals, on one line."""
    return " ".join(re.sub(r"\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", numbers).split())
