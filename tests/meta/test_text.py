"""Documents name only commands, options, targets and files that exist; no file knows a machine."""

from __future__ import annotations

import re
import shlex
from itertools import groupby, takewhile
from pathlib import Path

import click
import pytest

from tests.meta.project import ROOT, command, files, packages, scripts

DOCUMENTS = [path for path in files() if path.suffix == ".md"]
FENCE = re.compile(r"^```(?:console|sh|bash|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
REPOSITORY_PATH = re.compile(r"^(?:core|train|compact|deploy|tests|benchmarks|docs)/[\w./-]+$")

# In pieces, so that this file passes its own test.
FOREIGN = re.compile(
    "|".join(
        [
            r"pypi" + r"\.(?:org|python)",
            r"python" + r"hosted\.org",
            r"registry\." + r"npmjs",
            r"download\.pytorch" + r"\.org",
            r"(?<![\w.~-])/" + r"(?:work|root|home)/\w",
        ]
    )
)


def command_lines(document: Path) -> list[list[str]]:
    """The words of each command in a document's shell blocks, without prompts and comments.

    In a block with `$ ` prompts every other line is output.
    """
    lines: list[list[str]] = []
    for block in FENCE.findall(document.read_text(encoding="utf-8")):
        typed = block.replace("\\\n", " ").splitlines()
        prompted = [line[2:] for line in typed if line.startswith("$ ")]
        for line in prompted or typed:
            tokens = shlex.split(line, comments=True)
            for separator, words in groupby(tokens, key=lambda token: token in ("&&", "|", ";")):
                if not separator:
                    name, *arguments = takewhile(lambda word: word != ">", words)
                    lines.append([Path(name).name, *arguments])
    return lines


def check_usage(words: list[str]) -> None:
    """Raise as click would: unknown option, wrong choice, missing or extra argument."""
    name, *arguments = words
    entry = command(name)
    context = click.Context(entry, info_name=name)
    values, rest, _ = entry.make_parser(context).parse_args(arguments)
    if rest:
        raise click.UsageError(f"extra arguments {rest}")
    for parameter in entry.get_params(context):
        value = values.get(parameter.name or "")
        if parameter.required and not value:
            raise click.MissingParameter(ctx=context, param=parameter)
        if isinstance(value, str) and not isinstance(parameter.type, (click.Path, click.File)):
            parameter.type.convert(value, parameter, context)


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_commands_in_documents_exist(document: Path) -> None:
    for words in command_lines(document):
        if words[0].startswith("eps-"):
            assert words[0] in scripts(), f"{' '.join(words)}: no such command"
            try:
                check_usage(words)
            except click.UsageError as error:
                pytest.fail(f"{' '.join(words)}: {error.format_message()}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_targets_in_documents_exist(document: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    used = {
        word
        for words in command_lines(document)
        if words[0] == "make"
        for word in words[1:]
        if "=" not in word
    }
    assert used <= set(targets)


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_files_in_documents_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = {document.parent / link for link in LINK.findall(text) if "://" not in link}
    words = [word for line in command_lines(document) for word in line[1:]]
    words += re.findall(r"`([^`\n]+)`", text)
    named = {ROOT / word for word in words if REPOSITORY_PATH.match(word)}
    assert not [str(path) for path in links | named if not path.exists()]


def test_readme_has_commands() -> None:
    """So that a change of its mark-up does not quietly leave the tests above with nothing to do."""
    used = {words[0] for words in command_lines(ROOT / "README.md")}
    assert {"make", *scripts()} <= used


def test_no_file_names_a_registry_or_one_machine() -> None:
    found = []
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines = enumerate(text.splitlines(), start=1)
        found += [f"{ids(path)}:{number}: {line}" for number, line in lines if FOREIGN.search(line)]
    assert not found


def test_the_version_is_written_once() -> None:
    again = [
        ids(path)
        for folder in packages().values()
        for path in folder.rglob("*.py")
        if re.search(r"__version__\s*=\s*[\"']", path.read_text(encoding="utf-8"))
    ]
    assert not again
