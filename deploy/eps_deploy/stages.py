"""What a deployment has finished so far, kept until it is done, so that a killed one can go on.

Each stage has a key: the SHA-256 of everything that its result depends on (digests of its inputs,
its options, the versions of the packages that compute it). A result counts for that key alone, so
a changed option or file repeats the stages behind it and no others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eps_train.atomic import replace_file

_DIGITS = 16  # hexadecimal, of the key in a file's name


class Stages:
    """Results by stage in one folder.

    Args:
        folder: where they are kept; made with the first of them.
        resume: take what an earlier run left there. Otherwise all is done anew, and what is there
            stays until it is done again.

    Attributes:
        resumed: the stages whose results were taken from an earlier run, in order.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self._folder = folder
        self._resume = resume
        self.resumed: list[str] = []

    def data(self, name: str, inputs: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The plain data (as JSON has it) of a stage, from before or from `make`."""

        def encoded() -> bytes:
            return json.dumps(make(), allow_nan=False).encode()

        return json.loads(self.content(name, inputs, encoded))

    def content(self, name: str, inputs: Mapping[str, Any], make: Callable[[], bytes]) -> bytes:
        """The bytes of a stage, from before or from `make`.

        `inputs` are plain data. A result that was damaged since is made again.
        """
        path = self._path(name, inputs)
        if self._resume and (found := _intact(path)) is not None:
            self.resumed.append(name)
            return found
        made = make()
        replace_file(path, hashlib.sha256(made).digest() + made)
        return made

    def has(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether an earlier run left the result of this stage."""
        return self._resume and _intact(self._path(name, inputs)) is not None

    def left(self) -> bool:
        """Whether there is anything that a later run could take up."""
        return self._folder.is_dir() and any(self._folder.iterdir())

    def clear(self) -> None:
        """The deployment is done: nothing of it will be resumed."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str, inputs: Mapping[str, Any]) -> Path:
        return self._folder / f"{name}-{digest_of({'stage': name, **inputs})[:_DIGITS]}"


def digest_of(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _intact(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, found = content[:32], content[32:]
    return found if hashlib.sha256(found).digest() == digest else None
