"""Every option of every command has a test that observes its effect: `option_effects.toml`."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import click
import pytest

from tests.meta.project import ROOT, command, read_toml, scripts

TESTS = ROOT / "tests"
MAP = Path(__file__).with_name("option_effects.toml")
EFFECTS: dict[str, dict[str, str]] = read_toml(MAP)


def options(script: str) -> dict[str, click.Option]:
    """A command's options by their first long name."""
    found = (item for item in command(script).params if isinstance(item, click.Option))
    return {next(n for n in item.opts if n.startswith("--")): item for item in found}


@cache
def definitions(path: Path) -> dict[str, tuple[str, list[ast.expr]]]:
    """Source and decorators of what a module defines, by name: functions, classes, constants."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    found: dict[str, tuple[str, list[ast.expr]]] = {}
    for node in ast.parse(source).body:
        decorators = list(getattr(node, "decorator_list", []))
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        names = [getattr(node, "name", None), *map(ast.unparse, getattr(node, "targets", []))]
        for name in filter(None, names):
            found[name] = ("\n".join(lines[first - 1 : node.end_lineno]), decorators)
    return found


def scope(path: Path, test: str) -> str:
    """Source of a test and of what it names in its module and the `conftest.py` files above it."""
    folders = [folder for folder in path.parents if folder.is_relative_to(TESTS)]
    known: dict[str, tuple[str, list[ast.expr]]] = {}
    for file in (*(folder / "conftest.py" for folder in reversed(folders)), path):
        known |= definitions(file) if file.exists() else {}
    seen: dict[str, str] = {}
    waiting = [test]
    while waiting:
        name = waiting.pop()
        if name in known and name not in seen:
            seen[name] = known[name][0]
            waiting += re.findall(r"\w+", seen[name])
    return "\n".join(seen.values())


def mentions(text: str, option: click.Option) -> bool:
    """Whether one of its names stands in `text`, or its parameter as a keyword or in quotes."""
    names = "|".join(map(re.escape, [*option.opts, *option.secondary_opts]))
    spelled = rf"(?<![\w-])(?:{names})(?![\w-])"
    return bool(re.search(rf'{spelled}|\b{option.name}=|"{option.name}"', text))


@pytest.mark.parametrize("script", sorted(scripts()))
def test_every_option_is_mapped(script: str) -> None:
    assert list(EFFECTS.get(script, {})) == list(options(script)), (
        f"give each option of {script} one line in tests/meta/{MAP.name}, in the order of --help,"
        " with a test that observes what the option does"
    )


@pytest.mark.parametrize(
    ("script", "option"), [(script, option) for script in EFFECTS for option in EFFECTS[script]]
)
def test_its_test_exists_and_names_it(script: str, option: str) -> None:
    place, _, name = EFFECTS[script][option].partition("::")
    test, _, case = name.removesuffix("]").partition("[")
    path = TESTS / place
    assert path.exists()
    assert test in definitions(path)
    assert test.startswith("test_")
    cases = {
        node.value
        for decorator in definitions(path)[test][1]
        for node in ast.walk(decorator)
        if isinstance(node, ast.Constant)
    }
    assert not case or case in cases
    assert mentions(scope(path, test), options(script)[option])
