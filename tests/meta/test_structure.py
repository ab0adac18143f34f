"""The shape of the source: unique names, no circular imports, nothing private crosses a module."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.meta.project import module_name, packages

MODULES = {
    module_name(path, package): path
    for package, folder in packages().items()
    for path in sorted(folder.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def test_a_class_name_is_used_once() -> None:
    """Names with an underscore are private to their module."""
    homes = defaultdict(list)
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name)
    assert not {name: where for name, where in homes.items() if len(where) > 1}


@pytest.mark.parametrize("package", packages())
def test_a_module_name_is_used_once_in_a_package(package: str) -> None:
    """Command modules have the names of their commands."""
    homes = defaultdict(list)
    for path in packages()[package].rglob("*.py"):
        if not path.stem.startswith("__") and path.parent.name != "cli":
            homes[path.stem].append(module_name(path, package))
    assert not {name: where for name, where in homes.items() if len(where) > 1}


def test_imports_have_no_circle() -> None:
    """Of the imports that run when a module is loaded; for type checkers alone does not count."""
    graph = {name: set(_loaded(tree)) & MODULES.keys() - {name} for name, tree in TREES.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"circular import: {' -> '.join(error.args[1])}")


def _loaded(tree: ast.Module) -> set[str]:
    """Modules, and names within them, that the top level of a module imports."""
    found = set()
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {node.module}
        elif isinstance(node, ast.Try):
            waiting += node.body
    return found


def test_private_names_stay_in_their_module() -> None:
    taken = [
        f"{name} imports {alias.name} from {node.module}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eps_")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not taken


def test_every_module_says_what_it_is() -> None:
    silent = [
        name
        for name, tree in TREES.items()
        if not ast.get_docstring(tree) and Path(MODULES[name]).stat().st_size
    ]
    assert not silent
