"""Commands of the product that benchmarks run, each once, in a folder named by what it computes."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A command of the product, run once in a folder of its own.

    Attributes:
        words: the command; `{NAME}` stands for the checkpoint of the step `needs[NAME]`.
        needs: steps by name.
        makes: the checkpoint that it writes.
    """

    words: tuple[str, ...]
    needs: Mapping[str, Step] = field(default_factory=dict)
    makes: str = "ckpt.pt"

    @property
    def key(self) -> str:
        needed = {name: step.key for name, step in self.needs.items()}
        content = json.dumps([self.words, needed, self.makes]).encode()
        return hashlib.sha256(content).hexdigest()[:16]


def run(step: Step, work: Path, *options: str) -> Path:
    """Run a step and those it needs, unless they have been; returns its checkpoint's path.

    A training that was stopped goes on. `step.json` in the step's folder has its processor seconds,
    `out.txt` what it printed.

    Args:
        step: a command of the product, or a script beside this one.
        work: folder of the steps' folders.
        options: of all commands; they do not change what is computed.
    """
    folder = work / step.key
    record = folder / "step.json"
    if record.exists():
        return folder / step.makes
    needed = {name: str(run(other, work, *options).resolve()) for name, other in step.needs.items()}
    folder.mkdir(parents=True, exist_ok=True)
    command, *words = step.words
    if command.endswith(".py"):
        program = [sys.executable, str(Path(__file__).with_name(command))]
    else:
        program = [str(Path(sys.executable).with_name(command))]
    line = [*program, *(word.format_map(needed) for word in words), *options]
    if command == "eps-train":
        line.append("--resume" if (folder / "last.pt").exists() else "--force")
    elif command == "eps-compact":
        line.append("--force")
    before = folder / "seconds.json"
    seconds = json.loads(before.read_text()) if before.exists() else 0.0
    print(f"{step.key} $ {' '.join(step.words)}", file=sys.stderr, flush=True)
    began = _child_seconds()
    with (folder / "out.txt").open("a") as out:
        try:
            subprocess.run(
                line,
                cwd=folder,
                check=True,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        finally:
            seconds += _child_seconds() - began
            before.write_text(json.dumps(seconds))
    record.write_text(json.dumps({"words": step.words, "seconds": seconds}))
    return folder / step.makes


def _child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
