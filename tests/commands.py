"""Running one of the commands as a user would, in this process, so that a test takes no seconds."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line that a refused command ends with."""
        return self.stderr.strip().splitlines()[-1] if self.stderr.strip() else ""


def run(name: str, main: Callable[[], object], *args: object, cwd: Path) -> Result:
    """Call a console script's `main` with `args` in the folder `cwd`."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = 0
    before = Path.cwd()
    os.chdir(cwd)
    try:
        with (
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            mock.patch.object(sys, "argv", [name, *map(str, args)]),
        ):
            try:
                main()
            except SystemExit as end:
                code = end.code
    finally:
        os.chdir(before)
    assert isinstance(code, int), code
    return Result(code, stdout.getvalue(), stderr.getvalue())


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content: to show that a refusal left all as it was."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
