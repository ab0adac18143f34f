"""Writing a bundle: in a temporary folder beside its place, verified, then renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from eps_deploy.bundle import MANIFEST, encode_manifest, is_bundle, load_bundle
from eps_train.console import refuse_existing
from eps_train.errors import ConfigError


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
        name = tempfile.mkdtemp(
            dir=self.output.parent, prefix=f".{self.output.name}.", suffix=".part"
        )
        self.folder = Path(name)
        self.folder.chmod(0o777 & ~_umask())  # mkdtemp makes folders private; ours are as any other
        return self

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
        old = self.folder.with_suffix(".old")
        replacing = self.output.exists()
        if replacing:
            self.output.rename(old)
        try:
            self.folder.rename(self.output)
        except OSError:
            if replacing:
                old.rename(self.output)
            raise
        if replacing:
            shutil.rmtree(old)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # gone already after a commit


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
