"""The page at `/`: one file that loads nothing from anywhere but this server."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

_INLINE = re.compile(rb"<(style|script)>(.*?)</\1>", re.DOTALL)


@cache
def html() -> bytes:
    return files(__package__).joinpath("page.html").read_bytes()


@cache
def headers() -> list[tuple[bytes, bytes]]:
    """A content security policy that lets the page run its own script and style alone."""
    hashes: dict[bytes, bytes] = {}
    for kind, text in _INLINE.findall(html()):
        digest = base64.b64encode(hashlib.sha256(text).digest())
        hashes[kind] = b"'sha256-" + digest + b"'"
    policy = (
        b"default-src 'none'; connect-src 'self'; img-src blob: data:; base-uri 'none';"
        b" form-action 'none'; frame-ancestors 'none'; style-src %s; script-src %s"
    ) % (hashes[b"style"], hashes[b"script"])
    return [
        (b"content-security-policy", policy),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache"),
    ]
