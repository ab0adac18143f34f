"""What a user gets: the wheel is built once, looked into, and run from outside the repository."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

from tests.meta.project import ROOT, packages, pyproject, scripts
from tests.meta.test_imports import HELP, run_python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    folder = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def dist_info() -> str:
    return f"eps_resnet-{pyproject()['project']['version']}.dist-info"


def test_top_level(names: set[str]) -> None:
    assert {name.partition("/")[0] for name in names} == {*packages(), dist_info()}


@pytest.mark.parametrize("package", sorted(packages()))
def test_every_file_of_a_package_is_in_it(package: str, names: set[str]) -> None:
    """So that no pattern in .gitignore, which the build obeys, takes one out."""
    folder = packages()[package]
    expected = {
        path.relative_to(folder.parent).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert f"{package}/py.typed" in expected
    assert expected == {name for name in names if name.startswith(f"{package}/")}


def test_licence_and_metadata(unpacked: Path) -> None:
    folder = unpacked / dist_info()
    licence = (folder / "licenses" / "LICENSE").read_text(encoding="utf-8")
    assert licence == (ROOT / "LICENSE").read_text(encoding="utf-8")
    metadata = Parser().parsestr((folder / "METADATA").read_text(encoding="utf-8"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == set(
        pyproject()["project"]["optional-dependencies"]
    )


def test_commands(unpacked: Path) -> None:
    entries = ConfigParser(delimiters="=")
    entries.read(unpacked / dist_info() / "entry_points.txt", encoding="utf-8")
    assert dict(entries["console_scripts"]) == scripts()


@pytest.mark.parametrize("script", sorted(scripts()))
def test_commands_run_from_the_wheel(script: str, unpacked: Path) -> None:
    where = "import eps_train; print(eps_train.__file__)"
    assert str(unpacked) in run_python(where, path=unpacked)
    assert f"Usage: {script}" in run_python(HELP, script, scripts()[script], path=unpacked)
