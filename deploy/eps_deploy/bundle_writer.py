"""Writing a bundle: in a temporary folder beside its place, verified, then renamed into place.

The temporary folder's name is always the same, and a lock is held on it, so that what a killed run
leaves behind is taken over by the next one, and two runs at once do not meet in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from eps_deploy.bundle import MANIFEST, encode_manifest, is_bundle, load_bundle
from eps_train import folder_lock
from eps_train.console import refuse_existing
from eps_train.errors import ConfigError, naming


class BundleWriter:
    """A context manager: put files into `folder`, then `commit`. Without a commit nothing remains.

    Args:
        output: the bundle's place. What exists there is replaced only with `force`, and only if it
            is a bundle with nothing in it but its own files.
        force: as `--force`.

    Raises:
        ConfigError: `output` exists and may not be replaced.
    """

    def __init__(self, output: Path, *, force: bool) -> None:
        self.output = Path(os.path.abspath(output))
        self.folder = self.output.with_name(f".{self.output.name}.eps-deploy.part")
        self._old = self.output.with_name(f".{self.output.name}.eps-deploy.old")
        # What a killed run had finished; the next one may go on from there.
        self.stages = self.output.with_name(f".{self.output.name}.eps-deploy.stages")
        self._named = output
        self._force = force
        self._check_place()

    def _check_place(self) -> None:
        for parent in self.output.parents:
            if parent.exists():
                if not parent.is_dir():
                    raise ConfigError(f"{self._named}: {parent.name} is a file; choose another -o")
                break
        refuse_existing([self._named], self._force)
        if not self.output.exists() and not self.output.is_symlink():
            return
        if self.output.is_symlink() or not is_bundle(self.output):
            raise ConfigError(
                f"{self._named}: is not a bundle, so --force does not replace it; choose another -o"
            )
        strangers = _files(self.output) - _listed(self.output)
        if strangers:
            raise ConfigError(
                f"{self._named}: --force would delete {min(strangers)}, which is no part of the"
                " bundle; move it away or choose another -o"
            )

    def __enter__(self) -> BundleWriter:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with naming(self._named):
            self._lock = folder_lock.acquire(
                self.folder,
                f"{self._named}: another eps-deploy is writing it; wait for that one or choose"
                " another -o",
                follow=False,  # a link would lead to a folder that is not ours to empty
            )
        try:
            with naming(self._named):
                self._clear_up()
            self._check_place()  # clearing up may have put an old bundle back
        except BaseException:
            self._leave()
            raise
        return self

    def _clear_up(self) -> None:
        """Do away with what a killed run left; the bundle that it had moved aside comes back."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if self._old.exists() and not self.output.exists():
            self._old.rename(self.output)
        elif self._old.exists():
            shutil.rmtree(self._old)

    def commit(self, fields: Mapping[str, Any]) -> None:
        """Add the manifest of `fields` and of every file in `folder`, verify, move into place."""
        files = {}
        for name in sorted(_files(self.folder)):
            content = (self.folder / name).read_bytes()
            files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        (self.folder / MANIFEST).write_bytes(encode_manifest({**fields, "files": files}))
        for name in (*files, MANIFEST):
            _flush(self.folder / name)
        load_bundle(self.folder)
        self._check_place()  # it may have come into being meanwhile
        replacing = self.output.exists()
        if replacing:
            self.output.rename(self._old)
        try:
            self.folder.rename(self.output)
        except OSError:
            if replacing:
                self._old.rename(self.output)
            raise
        if replacing:
            shutil.rmtree(self._old)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()
        # A full disk does not say which file it was, and nobody knows the temporary ones.
        if isinstance(error, OSError) and error.errno is not None and self._is_ours(error.filename):
            error.filename = str(self._named)

    def _leave(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # gone already after a commit
        folder_lock.release(self._lock)

    def _is_ours(self, name: str | None) -> bool:
        ours = (self.folder, self.stages)
        return name is None or any(Path(name).is_relative_to(folder) for folder in ours)


def _files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in found}


def _listed(folder: Path) -> set[str]:
    files = json.loads((folder / MANIFEST).read_bytes()).get("files")
    return {MANIFEST, *files} if isinstance(files, dict) else {MANIFEST}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
