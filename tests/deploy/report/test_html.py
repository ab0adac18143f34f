"""report.html: one page that loads nothing, escapes everything, and is accessible."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eps_deploy.report.render import render_html
from tests.deploy.report.reports import (
    HOSTILE,
    PROVOKED,
    deep,
    deferred,
    failed,
    make_report,
    without_baseline,
)

VOID = {"meta", "br", "hr", "img", "input", "link"}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "footer"),
    *("h1", "h2", "h3", "p", "span", "strong", "code", "ul", "li", "dl", "div", "dt", "dd"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption"),
    *("svg", "g", "circle", "path", "text", "img"),
}


class Page(HTMLParser):
    """A page as a list of elements and its text; every element must be closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> names an attribute twice"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@cache
def html(kind: str) -> str:
    return render_html(PROVOKED[kind]())


@cache
def page(kind: str) -> Page:
    return Page(html(kind))


every_kind = pytest.mark.parametrize("kind", sorted(PROVOKED))


@every_kind
def test_it_loads_and_runs_nothing(kind: str) -> None:
    found = page(kind)
    assert {tag for tag, _ in found.elements} <= ALLOWED
    for tag, attributes in found.elements:
        # The content security policy would ignore a style, and there is nothing to click.
        banned = {name for name in attributes if name.startswith("on")} | {"style", "href"}
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert not banned & set(attributes), f"<{tag} {attributes}>"
    style = html(kind).partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


@every_kind
def test_the_policy_allows_only_its_own_style(kind: str) -> None:
    text = html(kind)
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = (
        attributes["content"]
        for attributes in Page(text).all("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")


@every_kind
def test_everybody_can_read_it(kind: str) -> None:
    found = page(kind)
    assert found.all("html") == [{"lang": "en"}]
    assert any(attributes.get("name") == "viewport" for attributes in found.all("meta"))
    headings = [tag for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    assert all(th.get("scope") in ("row", "col") for th in found.all("th"))
    for svg in found.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and svg["aria-label"])
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = [attributes["aria-labelledby"] for attributes in found.all("section")]
    assert set(labels) <= set(ids)


@every_kind
def test_charts_stay_within_their_frame(kind: str) -> None:
    charts = re.findall(r'<svg class="chart".*?</svg>', html(kind))
    assert len(charts) >= (0 if kind == "deferred" else 3)
    for chart in charts:
        (size,) = re.findall(r'viewBox="0 0 (\d+) (\d+)"', chart)
        width, height = map(float, size)
        points = re.findall(r"[ML] ([-.\d]+) ([-.\d]+)", chart)
        points += re.findall(r'x="(\S+)" y="(\S+)"', chart)
        assert len(points) > 10
        assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in points)


@pytest.mark.parametrize(
    ("kind", "headline"),
    [("plain", "Passed"), ("failed", "Failed"), ("deferred", "Not judged yet")],
)
def test_the_verdict_comes_first(kind: str, headline: str) -> None:
    text = html(kind)
    assert f"<title>{headline}: deployment report</title>" in text
    assert text.index(f"<h1>{headline}</h1>") < text.index("<h2")


def test_a_failure_is_explained() -> None:
    text = Page(render_html(failed())).text
    assert "4 of 5 checks failed: compact network (torch) → model.onnx; model.onnx → engine" in text
    for said in ("not finite", "equal to the last bit", "slower", "cannot tell", "too few runs"):
        assert said in text


def test_a_deferred_engine() -> None:
    text = Page(render_html(deferred())).text
    assert "All 3 checks that could run passed. Too few images to be sure: accuracy." in text
    assert "--defer-build: this machine has no GPU" in text
    assert "not known: the engine is not built yet" in text
    assert "Deferred yes" in text
    assert "Not measured." in text
    assert "Speed-up, batch" not in text


def test_without_a_trained_baseline_nothing_is_said_of_a_drop() -> None:
    text = Page(render_html(without_baseline())).text
    assert "the drop in accuracy is not known" in text
    assert "no baseline.pt beside the checkpoint" in text
    assert "percentage points (to the left" not in text
    assert "Changed answers" not in text
    assert "Accuracy by class" in text


def rows(found: Page) -> int:
    return len([th for th in found.all("th") if th.get("scope") == "row"])


def test_the_classes_that_lost_most_come_first() -> None:
    found = make_report(classes=["kept", "lost"], lost=0, won=0)
    text = Page(render_html(found)).text
    assert "Accuracy by class" in text
    assert "more classes are in report.json" not in text
    drops = found["answers"]["classes"][1]["drop"]
    drops.update(points=12.0, low=9.0, high=15.0)
    text = Page(render_html(found)).text
    assert "lost: +12.00 (+9.00 to +15.00) kept: +0.00 (−0.08 to +0.08)" in text


def test_a_thousand_classes_stay_readable() -> None:
    found = page("thousand")
    assert rows(found) < 80
    assert "20 of 1,000 classes: those that lost most" in found.text
    assert "980 more classes are in report.json." in found.text
    (label,) = (s["aria-label"] for s in found.all("svg") if "classes" in s.get("aria-label", ""))
    assert len(label) < 250
    assert "top-5 accuracy" in found.text
    assert "Drop in top-5 accuracy: +0.00 (" in found.text
    assert "top-5 accuracy" not in page("plain").text


def test_without_a_baseline_the_least_accurate_classes_are_listed() -> None:
    found = without_baseline()
    few = found["answers"]["classes"]
    found["answers"]["classes"] = [
        {**few[0], "name": f"c{index}", "judged": 1 - index / 100} for index in range(25)
    ]
    text = Page(render_html(found)).text
    assert "20 of 25 classes: the least accurate" in text
    assert "c24 1,000 not measured 76.00 % c23" in text
    assert "c4 " not in text


def test_a_class_without_images_is_named() -> None:
    found = make_report(classes=["some", "others", "none"])
    for key in ("baseline", "judged", "drop"):
        found["answers"]["classes"][2][key] = None
    found["answers"]["classes"][2]["samples"] = 0
    assert "Without test images: none." in Page(render_html(found)).text


def test_a_class_that_fails_is_in_the_verdict() -> None:
    found = make_report(lost=900, won=0, limit=100, classes=["a", "b"], class_limit=1.0)
    text = Page(render_html(found)).text
    assert "1 of 6 checks failed: accuracy by class. Classes that lost too much: a, b." in text
    assert "at most 1 in any class" in text
    assert 'column "at least"' in text


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, "PNG")
    return file.getvalue()


def test_the_gallery_shows_the_images_of_the_report() -> None:
    found = make_report(lost=3, won=2)
    names = [entry["image"] for entry in found["answers"]["changed"]]
    assert len(names) == 5
    sizes = [(8, 8), (32, 16), (160, 160), (640, 320), (90, 1000)]
    images = {name: png(size) for name, size in zip(names, sizes, strict=True)}
    shown = Page(render_html(found, images))
    expected = [(8, 8), (32, 16), (160, 160), (160, 80), (14, 160)]
    for image, entry, size in zip(
        shown.all("img"), found["answers"]["changed"], expected, strict=True
    ):
        assert image["alt"] == f"Test image {entry['index']}"
        assert (int(image["width"]), int(image["height"])) == size
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        with Image.open(io.BytesIO(content)) as decoded:
            assert decoded.size == size
        assert (image.get("class") == "coarse") == (max(size) < 80)
    assert "only the unpruned network right 3, only the compact network right 2." in shown.text
    assert "Only the compact network right" in shown.text
    assert "unpruned: 0, 95 % compact: 1, 60 %" in shown.text


def test_equal_answers_leave_no_gallery() -> None:
    shown = Page(render_html(make_report(lost=0, won=0)))
    assert "Both networks predict the same class for all 10,000 test images." in shown.text
    assert shown.all("img") == []


def test_every_block_is_on_the_map() -> None:
    blocks = [
        attributes
        for attributes in Page(render_html(deep())).all("span")
        if attributes.get("class", "").startswith("block ") and "title" in attributes
    ]
    assert len(blocks) == 375
    assert {attributes["class"] for attributes in blocks} == {
        "block alive",
        "block dead",
        "block removed",
    }
    assert "not lossless" in Page(render_html(deep())).text


def test_names_are_shown_and_are_no_markup() -> None:
    found = page("hostile")
    assert found.all("script") == []
    assert found.text.count(HOSTILE.strip()) > 5
    assert HOSTILE.strip() not in html("hostile")


def test_the_same_data_give_the_same_page() -> None:
    assert render_html(make_report()) == render_html(make_report())


def test_the_bundle_s_page_is_that_of_its_data(deployed: Path) -> None:
    bundle = deployed / "bundle"
    found: dict[str, Any] = json.loads((bundle / "report.json").read_bytes())
    text = (bundle / "report.html").read_text(encoding="utf-8")
    names = [entry["image"] for entry in found["answers"]["changed"] if entry["image"]]
    assert text == render_html(found, {name: (bundle / name).read_bytes() for name in names})
    Page(text)


def palettes() -> list[dict[str, str]]:
    """The custom properties of the light page, and of the dark one."""
    style = (files("eps_deploy.report") / "templates" / "report.css").read_text(encoding="utf-8")
    roots = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", root)) for root in roots]
    assert len(found) == 2
    assert set(found[0]) == set(found[1])
    return found


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2."""
    channels = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(dark: bool) -> None:
    """WCAG 2 AA: 4.5 for text, 3 for what is drawn."""
    colors = palettes()[dark]
    texts = [(text, ground) for text in ("ink", "muted") for ground in ("page", "card")]
    texts += [(tone, "page") for tone in ("pass", "fail", "wait")]
    texts += [(tone, f"{tone}-tint") for tone in ("pass", "fail", "wait")]
    texts += [("ink", f"{tone}-tint") for tone in ("pass", "fail", "wait")]
    for text, ground in texts:
        assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
    for drawn in ("old", "new"):
        assert contrast(colors[drawn], colors["page"]) >= 3, drawn
