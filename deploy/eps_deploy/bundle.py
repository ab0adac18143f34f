"""The bundle: a folder with everything that serves a network, and a manifest that vouches for it.

`manifest.json` holds the SHA-256 of every other file, and its own: `digest` is the SHA-256 of the
manifest's bytes with the digest's 64 digits replaced by zeros. :func:`load_bundle` checks all of
it. No torch here: servers have none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from eps_train.errors import ConfigError, FileFormatError
from eps_train.preprocess import Preprocessing

FORMAT = "eps-resnet-bundle"
SCHEMA = 1
MANIFEST = "manifest.json"
NAME = "eps_resnet"  # of a model that was given none
NO_DIGEST = "0" * 64
_AGAIN = "restore it from a good copy or run eps-deploy again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A verified bundle.

    Attributes:
        root: its folder.
        name: of the model; clients ask for it.
        manifest: `manifest.json` as plain data.
        preprocessing: from a picture to the network's input.
        labels: names of the classes, by index.
        input_shape: shape `[C, H, W]` of one image.
        model: name of the file that the engine loads.
    """

    root: Path
    name: str
    manifest: Mapping[str, Any]
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    input_shape: tuple[int, int, int]
    model: str

    def read(self, name: str) -> bytes:
        """The bytes of one of the bundle's files, verified again. Raises FileFormatError."""
        listed = self.manifest["files"].get(name)
        if listed is None:
            raise FileFormatError(f"{self.root}: the bundle has no file {name}")
        return _verified(self.root, name, listed)


def load_bundle(path: Path | str) -> Bundle:
    """Read a bundle and verify every file that its manifest lists.

    Raises FileFormatError, in one line that names the file, when anything is missing, truncated,
    changed, foreign, or written by a newer eps-resnet.
    """
    root = Path(path)
    manifest = _read_manifest(root)
    try:
        channels, height, width = manifest["input"]["shape"][1:]
        bundle = Bundle(
            root=root,
            name=check_name(manifest.get("name", NAME)),
            manifest=manifest,
            preprocessing=Preprocessing.from_dict(manifest["preprocessing"]),
            labels=tuple(str(label) for label in manifest["labels"]),
            input_shape=(int(channels), int(height), int(width)),
            model=str(manifest["engine"]["file"]),
        )
        files = dict(manifest["files"])
        classes = int(manifest["output"]["shape"][1])
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise FileFormatError(f"{root / MANIFEST}: not a usable manifest ({error!r})") from error
    if bundle.model not in files:
        raise FileFormatError(f"{root / MANIFEST}: it does not list its own model {bundle.model}")
    if bundle.preprocessing.shape != bundle.input_shape or len(bundle.labels) != classes:
        raise FileFormatError(f"{root / MANIFEST}: preprocessing, labels and model do not agree")
    for name, listed in files.items():
        _verified(root, name, listed)
    return bundle


def check_name(name: Any) -> str:
    """A model's name that paths, folders, Triton and KServe take. Raises ConfigError for another.

    It is one part of a URL and one folder, as both write it without escapes; `v2/models/stats` has
    a meaning of its own.
    """
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name)):
        raise ConfigError(
            f"model name {name!r}: use up to 63 letters, digits, '_', '-' and '.', a letter or"
            " digit first"
        )
    if name == "stats":
        raise ConfigError("model name 'stats': the protocol has a path of this name; use another")
    return name


def is_bundle(folder: Path) -> bool:
    """Whether `folder` holds a manifest of ours, of any version and however damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def encode_manifest(fields: Mapping[str, Any]) -> bytes:
    """The manifest's bytes, sealed with their own digest."""
    unsealed = {"format": FORMAT, "schema": SCHEMA, "digest": NO_DIGEST, **fields}
    text = json.dumps(unsealed, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    blank = text.encode()
    digest = hashlib.sha256(blank).hexdigest()
    return blank.replace(NO_DIGEST.encode(), digest.encode(), 1)


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not root.is_dir():
        problem = "is a file, not a bundle's folder" if root.exists() else "no such folder"
        raise FileFormatError(f"{root}: {problem}; name the folder that eps-deploy wrote")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileFormatError(f"{root}: not a bundle of eps-deploy (no {MANIFEST} in it)") from None
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror}; {_AGAIN}") from None
    try:
        manifest = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise FileFormatError(f"{path}: damaged or not JSON; {_AGAIN}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FileFormatError(f"{path}: not a manifest of eps-deploy")
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise FileFormatError(
            f"{path}: schema {schema} is newer than this eps-resnet reads (up to {SCHEMA});"
            " upgrade eps-resnet"
        )
    digest = str(manifest.get("digest")).encode()
    blank = content.replace(digest, NO_DIGEST.encode(), 1)
    if schema != SCHEMA or hashlib.sha256(blank).hexdigest().encode() != digest:
        raise FileFormatError(f"{path}: damaged or edited (its digest does not match); {_AGAIN}")
    return manifest


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _verified(root: Path, name: str, listed: Any) -> bytes:
    """The content of a listed file.

    A manifest can be forged, so its names must stay in the bundle. Links may lead anywhere, as into
    the store of a Hugging Face cache or of DVC: the SHA-256 proves what is read through them.
    """
    pure = PurePosixPath(name)
    path = root / pure
    if pure.is_absolute() or ".." in pure.parts or any(sign in name for sign in "\\:\0"):
        raise FileFormatError(f"{root / MANIFEST}: lists {name}, which lies outside the bundle")
    wanted = listed if isinstance(listed, dict) else {}
    try:
        # Before a byte is read: a link may lead to a device without end.
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise FileFormatError(f"{path}: not a file; {_AGAIN}")
        if found.st_size != wanted.get("bytes"):
            raise FileFormatError(
                f"{path}: {found.st_size} bytes where the manifest says {wanted.get('bytes')};"
                f" {_AGAIN}"
            )
        content = path.read_bytes()
    except FileNotFoundError:
        where = f" (its link leads to {os.readlink(path)})" if path.is_symlink() else ""
        raise FileFormatError(f"{path}: missing from the bundle{where}; {_AGAIN}") from None
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != wanted.get("sha256"):
        raise FileFormatError(f"{path}: changed: its SHA-256 is not the manifest's; {_AGAIN}")
    return content
