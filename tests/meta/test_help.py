"""The text of `--help` changes on purpose only.

Write the recorded texts again with `EPS_WRITE_GOLDEN=1 pytest tests/meta/test_help.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest

from tests.meta.project import command, scripts

GOLDEN = Path(__file__).with_name("golden")


@pytest.mark.parametrize("script", sorted(scripts()))
def test_help_is_as_recorded(script: str) -> None:
    context = click.Context(command(script), info_name=script, terminal_width=100)
    text = command(script).get_help(context) + "\n"
    recorded = GOLDEN / f"{script}.txt"
    if os.environ.get("EPS_WRITE_GOLDEN"):
        recorded.write_text(text, encoding="utf-8")
    assert text == recorded.read_text(encoding="utf-8")
