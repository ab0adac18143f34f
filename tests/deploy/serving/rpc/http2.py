"""HTTP/2 frames written by hand, which no client library would send."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
_STREAM = 1


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _header(name: bytes, value: bytes) -> bytes:
    """A literal field, neither indexed nor Huffman coded (RFC 7541, 6.2.2)."""
    assert max(len(name), len(value)) < 127
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def _headers(stream: int, path: bytes, metadata: dict[str, bytes]) -> bytes:
    fields = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x"}
    fields |= {b"content-type": b"application/grpc", b"te": b"trailers"}
    fields |= {name.replace("_", "-").encode(): value for name, value in metadata.items()}
    block = b"".join(_header(name, value) for name, value in fields.items())
    return _frame(_HEADERS, _END_HEADERS, stream, block)


def begin(port: int, path: bytes, calls: int) -> socket.socket:
    """A connection with so many calls that have begun and send nothing."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    streams = (_headers(1 + 2 * number, path, {}) for number in range(calls))
    connection.sendall(_PREFACE + _frame(_SETTINGS, 0, 0) + b"".join(streams))
    return connection


def call(port: int, path: bytes, **metadata: bytes) -> None:
    """Make a gRPC call with an empty message, and wait for the end of its answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(
            _PREFACE
            + _frame(_SETTINGS, 0, 0)
            + _headers(_STREAM, path, metadata)
            + _frame(_DATA, _END_STREAM, _STREAM, bytes(5))
        )
        for kind, flags, stream in _frames(connection):
            if stream == _STREAM and kind == _HEADERS and flags & _END_STREAM:
                return
        raise AssertionError("the connection was closed")


def _frames(connection: socket.socket) -> Iterator[tuple[int, int, int]]:
    with connection.makefile("rb") as stream:
        while head := stream.read(9):
            stream.read(int.from_bytes(head[:3], "big"))
            yield head[3], head[4], int.from_bytes(head[5:9], "big")
