"""The command lines as text: each command's arguments and options with their types and defaults.

Regenerate the frozen copy with `python -m tests.meta.cli_surface` in the repository root.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tests.meta.project import command, scripts

FROZEN = Path(__file__).with_name("cli_surface.txt")


def _kind(info: dict[str, Any]) -> str:
    if info.get("is_flag"):
        return "flag"
    choices = info["type"].get("choices")
    kind = "|".join(str(choice) for choice in choices) if choices else info["type"]["name"]
    repeated = info.get("multiple") or info["nargs"] == -1
    return f"{kind}..." if repeated else kind


def _row(parameter: click.Parameter) -> str:
    info = parameter.to_info_dict()
    names = [*info["opts"], *info["secondary_opts"]]
    if info["param_type_name"] == "argument":
        names = [str(parameter.make_metavar(click.Context(click.Command("x"))))]
    words = ["  " + " ".join(names), _kind(info)]
    if info["required"]:
        words.append("required")
    if info["default"] not in (None, False):
        words.append(f"default={info['default']}")
    if info.get("envvar"):
        words.append(f"envvar={info['envvar']}")
    return "  ".join(words)


def surface() -> str:
    lines: list[str] = []
    for script in sorted(scripts()):
        lines.append(script)
        lines += [_row(parameter) for parameter in command(script).params]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FROZEN.write_text(surface(), encoding="utf-8")
