"""The project as data: root, packages, commands and files, each read from where it is defined."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import click

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


@cache
def pyproject() -> dict[str, Any]:
    return read_toml(ROOT / "pyproject.toml")


def read_toml(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return tomllib.load(file)


@cache
def packages() -> dict[str, Path]:
    """Import name -> folder, for the packages that go into the wheel."""
    folders = pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    return {Path(folder).name: ROOT / folder for folder in folders}


@cache
def scripts() -> dict[str, str]:
    """Console script -> `module:attribute`."""
    found: dict[str, str] = pyproject()["project"]["scripts"]
    return found


@cache
def command(script: str) -> click.Command:
    """The click command behind a console script: its entry point or the only one in the module."""
    module_name, _, attribute = scripts()[script].partition(":")
    module = importlib.import_module(module_name)
    entry = getattr(module, attribute)
    if isinstance(entry, click.Command):
        return entry
    candidates = [value for value in vars(module).values() if isinstance(value, click.Command)]
    if len(candidates) != 1:
        raise LookupError(f"{module_name} holds {len(candidates)} click commands, not one")
    return candidates[0]


@cache
def files() -> tuple[Path, ...]:
    """Every file that is, or would be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = (ROOT / name for name in sorted(set(listed.split("\0"))) if name)
    return tuple(path for path in paths if path.is_file())


def module_name(path: Path, package: str) -> str:
    """`.../eps_train/data/folder.py` -> `eps_train.data.dataset.folder`."""
    parts = path.relative_to(packages()[package].parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Absolute names of all modules a file names in imports, wherever they stand in it.

    Strings that are exactly a dotted name of one of our packages count too: lazy exports use them.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.partition(".")[0] in packages()
        ):
            found.add(node.value)
    return found
