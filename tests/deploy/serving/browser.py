"""A page in headless Chromium, by the DevTools protocol."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-port=0",
)
_PATIENCE = 30.0
_KEYS = {"Tab": 9, "Enter": 13}


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._sent = 0
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: Any) -> Any:
        """A command of the protocol, and its result."""
        self._sent += 1
        await self._socket.send_json({"id": self._sent, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive(_PATIENCE)).data)
            if message.get("id") == self._sent:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    async def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str) -> None:
        """Wait until an expression is true."""

        async def wait() -> None:
            while not await self.run(script):
                await asyncio.sleep(0.02)

        await asyncio.wait_for(wait(), _PATIENCE)

    async def text(self, identifier: str) -> str:
        """What is to be read in an element."""
        found = await self.run(f"document.getElementById({identifier!r}).innerText")
        return str(found)

    async def drop(self, file: Path) -> None:
        """Drop a file from the desktop onto the middle of the field."""
        box = await self.run(
            "JSON.stringify(document.getElementById('drop').getBoundingClientRect())"
        )
        where = json.loads(box)
        x, y = where["x"] + where["width"] / 2, where["y"] + where["height"] / 2
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            await self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    async def press(self, key: str) -> None:
        codes = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **codes, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **codes)

    async def resize(self, width: int, height: int = 800) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )


@asynccontextmanager
async def opened(url: str, profile: Path) -> AsyncIterator[Page]:
    """The page at `url`; the browser keeps what it writes in `profile`."""
    assert CHROMIUM is not None
    process = subprocess.Popen(
        [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        lines = (re.search(r"ws://(127\.0\.0\.1:\d+)/", line) for line in process.stderr)
        address = next(found[1] for found in lines if found)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{address}/json") as response:
                tabs = await response.json(content_type=None)
            target = next(tab for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                await page.call("Page.enable")
                await page.call("Runtime.enable")
                await page.call("Page.navigate", url=url)
                await page.until(f"location.href === {url!r} && document.readyState === 'complete'")
                yield page
    finally:
        process.terminate()
        process.wait(_PATIENCE)
        process.stderr.close()
