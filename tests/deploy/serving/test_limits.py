"""Request bodies: size limits, and memory that is counted while they are held."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from eps_deploy.serving.limits import Body, Memory
from eps_deploy.serving.protocol import ApiError


def read(chunks: list[bytes], memory: Memory, headers: dict[str, str] | None = None) -> bytes:
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks
    ]
    if messages:
        messages[-1]["more_body"] = False
    messages.append({"type": "http.disconnect"})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    given = {name.encode(): value.encode() for name, value in (headers or {}).items()}

    async def body() -> bytes:
        with Body(given, receive, 10, memory) as it:
            content = await it.read()
            assert memory.used == len(content)
            return content

    return asyncio.run(body())


@pytest.mark.parametrize("headers", [{}, {"content-length": "6"}])
def test_a_body_in_chunks(headers: dict[str, str]) -> None:
    memory = Memory(100)
    assert read([b"abc", b"", b"def"], memory, headers) == b"abcdef"
    assert read([b""], memory) == b""
    assert memory.used == 0


@pytest.mark.parametrize("headers", [{}, {"content-length": "11"}])
def test_a_body_that_is_too_large(headers: dict[str, str]) -> None:
    memory = Memory(100)
    with pytest.raises(ApiError, match="larger than the 10 bytes") as caught:
        read([b"x" * 6, b"y" * 5], memory, headers)
    assert (caught.value.status, memory.used) == (413, 0)


def test_out_of_memory_for_bodies() -> None:
    memory = Memory(9)
    every: list[dict[str, str]] = [{}, {"content-length": "10"}]
    for headers in every:
        with pytest.raises(ApiError) as caught:
            read([b"x" * 5, b"y" * 5], memory, headers)
        assert (caught.value.status, caught.value.retry_after, memory.used) == (503, 1, 0)


def test_a_client_that_goes_away() -> None:
    memory = Memory(100)
    with pytest.raises(ApiError, match="went away"):
        read([], memory, {"content-length": "6"})
    assert memory.used == 0


def test_a_compressed_body_is_rejected() -> None:
    """It could be any size when it is unpacked."""
    with pytest.raises(ApiError, match="uncompressed") as caught:
        read([b"x"], Memory(100), {"content-encoding": "gzip"})
    assert caught.value.status == 415
    assert (b"accept-encoding", b"identity") in caught.value.headers
    assert read([b"x"], Memory(100), {"content-encoding": "identity"}) == b"x"
