"""The page in a browser: mouse, keyboard only, small screen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.serving.blocked import filled
from tests.deploy.serving.browser import CHROMIUM, Page, opened
from tests.deploy.serving.running import Client, command, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not on this machine"),
]

STATE = "document.getElementById('state').innerText"
ANSWERED = "document.querySelectorAll('#answer li').length"
ERROR = "(it => it.hidden ? '' : it.innerText)(document.getElementById('error'))"
Visit = Callable[[Page], Coroutine[Any, Any, None]]


def visit(client: Client, profile: Path, doing: Visit) -> None:
    async def all_of_it() -> None:
        async with opened(f"http://127.0.0.1:{client.port}/", profile) as page:
            await doing(page)
        thrown = [event for event in page.events if event["method"] == "Runtime.exceptionThrown"]
        assert thrown == []

    asyncio.run(all_of_it())


def test_images_are_dropped(deployed: Path, tmp_path: Path) -> None:
    """The label that the server gives, a file that is none, and a server that goes away."""
    image = next((deployed / "bundle" / "examples").glob("*.png"))
    (tmp_path / "text.txt").write_text("no image")
    options = ("--shadow", "baseline", "--shadow-share", 1)
    with command(deployed / "bundle", *options) as process:
        process.wait_ready()
        best = process.post("/v1/classify", image.read_bytes()).json["predictions"][0]["label"]

        async def doing(page: Page) -> None:
            await page.until(f"{STATE} === 'ready'")
            assert "Residual blocks kept" in await page.text("card")
            await page.drop(image)
            await page.until(f"{ANSWERED} === 5")
            assert (await page.text("answer")).startswith(best)
            assert await page.run("document.getElementById('preview').naturalWidth") == 8
            await page.until("document.getElementById('shadow').innerText.includes('served')")
            await page.drop(tmp_path / "text.txt")
            await page.until(f"{ERROR}.includes('not a JPEG, PNG or WebP image')")
            assert await page.run(ANSWERED) == 0
            assert process.stop() == 0
            await page.until(f"{STATE} === 'unreachable'")
            await page.drop(image)
            await page.until(f"{ERROR}.includes('cannot be reached')")

        visit(process, tmp_path / "profile", doing)


def test_a_busy_server(monkeypatch: pytest.MonkeyPatch, deployed: Path, tmp_path: Path) -> None:
    image = next((deployed / "bundle" / "examples").glob("*.png"))
    with filled(monkeypatch, deployed) as full:

        async def doing(page: Page) -> None:
            await page.until(f"{STATE} === 'ready'")
            await page.drop(image)
            await page.until(f"{ERROR}.endsWith('try again in 1 s')")
            full.engine.gate.set()
            until(lambda: full.queued == 0)
            await page.drop(image)
            await page.until(f"{ANSWERED} === 5")
            assert await page.run(ERROR) == ""

        visit(full.client, tmp_path / "profile", doing)


def test_keyboard_only(deployed: Path, tmp_path: Path) -> None:
    """A token is typed, then an image is chosen."""
    (tmp_path / "token").write_text("0123456789abcdef")
    with command(deployed / "bundle", "--token-file", tmp_path / "token") as process:
        process.wait_ready()

        async def doing(page: Page) -> None:
            focused = "document.activeElement.id"
            await page.until(f"{STATE} === 'wants a token' && {focused} === 'token'")
            await page.call("Input.insertText", text="wrong")
            await page.press("Enter")
            await page.until("document.getElementById('wrong').innerText !== ''")
            await page.call("Input.insertText", text="0123456789abcdef")
            await page.press("Enter")
            await page.until(f"{STATE} === 'ready'")
            while await page.run(focused) != "file":
                await page.press("Tab")
            outline = "getComputedStyle(document.getElementById('drop')).outlineStyle"
            assert await page.run(outline) == "solid"
            await page.call("Page.setInterceptFileChooserDialog", enabled=True)
            await page.press("Enter")
            await page.until("true")
            assert "Page.fileChooserOpened" in {event["method"] for event in page.events}

        visit(process, tmp_path / "profile", doing)


@pytest.mark.parametrize("width", [320, 390, 1100])
def test_no_horizontal_scrolling(deployed: Path, tmp_path: Path, width: int) -> None:
    with command(deployed / "bundle", "--shadow", "baseline") as process:
        process.wait_ready()

        async def doing(page: Page) -> None:
            await page.resize(width)
            await page.until(f"{STATE} === 'ready'")
            wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert await page.run(wide) == 0

        visit(process, tmp_path / "profile", doing)
