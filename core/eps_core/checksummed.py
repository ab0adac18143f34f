"""Checksummed files: `torch.save` archives that carry the SHA-256 of their own bytes.

`torch.load` verifies no record checksum, so a flipped bit would load wrong numbers without an
error. A checksummed file is an ordinary `torch.save` zip archive whose zip comment (APPNOTE.TXT
4.3.16, the last field of the archive) is the hexadecimal SHA-256 of every byte before it.
`torch.load` and `unzip` ignore the comment; :func:`read` checks it before it unpickles anything.
Payloads hold only tensors, dict, list, tuple, str, int, float, bool and None, and are always loaded
with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from eps_core.errors import FileFormatError
from eps_core.files import replace_file

_END_OF_ARCHIVE = b"PK\x05\x06"  # end of central directory record, 22 bytes when uncommented
_DIGITS = 64  # of a SHA-256 in hexadecimal
_PLAIN = (str, int, float, bool, type(None))

Payload = dict[str, Any]


def write(path: Path, payload: Payload) -> str:
    """Write `payload` to `path` atomically and return its digest (64 hexadecimal digits).

    The temporary file is read back and compared before it replaces `path`.

    Raises:
        TypeError: the payload is one that :func:`read` would refuse.
        OSError: as the file system does.
    """
    _require_plain(payload)
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    content = bytearray(buffer.getvalue())
    assert content[-22:-18] == _END_OF_ARCHIVE, "torch.save no longer ends with a bare zip record"
    content[-2:] = _DIGITS.to_bytes(2, "little")  # length of the comment
    digest = hashlib.sha256(content).hexdigest()
    content += digest.encode("ascii")
    replace_file(path, bytes(content))
    return digest


def read(path: Path, *, format: str, version: int) -> tuple[Payload, str]:
    """Return the verified payload of a checksummed file and its digest.

    Raises FileFormatError if it is missing, truncated, altered, foreign, of another ``format``, or
    of a newer ``version`` than the caller's.
    """
    content = read_bytes(path)
    digest = content[-_DIGITS:]
    if hashlib.sha256(content[:-_DIGITS]).hexdigest().encode("ascii") != digest:
        raise FileFormatError(
            f"{path}: damaged, truncated, or not an eps-resnet file"
            " (its SHA-256 checksum does not match); restore it from a good copy or make it again"
        )
    try:
        payload = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types for what it refuses
        raise FileFormatError(
            f"{path}: refused: it holds more than tensors and plain data"
        ) from error
    found = payload.get("format") if isinstance(payload, dict) else None
    if found != format:
        kind = found if isinstance(found, str) else "another program's file"
        article = "an" if format[0] in "aeiou" else "a"
        raise FileFormatError(f"{path}: expected {article} {format} file, found {kind}")
    if not isinstance(payload.get("version"), int) or payload["version"] < 1:
        raise FileFormatError(f"{path}: no usable format version; make the file again")
    if payload["version"] > version:
        raise FileFormatError(
            f"{path}: format version {payload['version']} is newer than this eps-resnet reads"
            f" (up to {version}); upgrade eps-resnet"
        )
    return payload, digest.decode("ascii")


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file that a user named. Raises FileFormatError if it is unreadable."""
    if path.is_dir():
        raise FileFormatError(f"{path}: is a folder, not a file")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileFormatError(f"{path}: no such file") from None
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror}") from None


def _require_plain(value: Any) -> None:
    """Raise TypeError for what the reader would refuse: a NumPy scalar, a path, a class."""
    if isinstance(value, torch.Tensor) or type(value) in _PLAIN:
        return
    if type(value) in (dict, OrderedDict):
        value = (*value.keys(), *value.values())
    if type(value) not in (list, tuple):
        raise TypeError(f"{type(value).__name__} is neither a tensor nor plain data: {value!r}")
    for item in value:
        _require_plain(item)
