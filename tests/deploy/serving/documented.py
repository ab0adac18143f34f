"""Run the commands and clients of docs/serving.md as they are written there."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.meta.project import ROOT


def document() -> str:
    return (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def run_client(package: str, meant: int, port: int) -> str:
    """Output of the client that uses `package`, with `port` in place of the one it `meant`."""
    codes = re.findall(r"```python\n(.*?)```", document(), re.DOTALL)
    (code,) = (code for code in codes if package in code)
    command = [sys.executable, "-c", code.replace(f":{meant}", f":{port}")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
