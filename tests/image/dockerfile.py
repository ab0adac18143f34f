"""The Dockerfile as data: as much of its syntax as ours has."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


def read(path: Path) -> dict[str, Stage]:
    """The stages by name, each with its instructions, `(word, rest)`, on one line each."""
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    stage = None
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.split()
            stage = stages[name] = Stage(name, base)
        elif stage is not None:
            stage.instructions.append((word, rest.strip()))
    return stages


def last(stages: dict[str, Stage], name: str, word: str) -> str:
    """What the last `word` says in a stage or in those that it stands on."""
    while name in stages:
        found = [rest for key, rest in stages[name].instructions if key == word]
        if found:
            return found[-1]
        name = stages[name].base
    raise LookupError(f"{word} is nowhere")


def words(stages: dict[str, Stage], name: str, word: str) -> list[str]:
    """An instruction in exec form; ValueError in any other."""
    found: list[str] = json.loads(last(stages, name, word))
    return found
