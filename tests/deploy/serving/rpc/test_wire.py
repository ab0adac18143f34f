"""The outermost layer of a message: what is a tensor, what is left, and what is no message."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as messages

from eps_deploy.serving.protocol import ApiError
from eps_deploy.serving.rpc.wire import split
from tests.deploy.serving.rpc.asking import blank, request


def test_a_request_in_parts() -> None:
    message = request(blank(3))
    message.id = "7"
    message.parameters["timeout"].int64_param = 5
    message.raw_input_contents.append(b"more")
    rest, raw = split(message.SerializeToString())
    assert [bytes(tensor) for tensor in raw] == [blank(3).tobytes(), b"more"]
    del message.raw_input_contents[:]
    assert messages.ModelInferRequest.FromString(rest) == message


def test_pixels_are_not_copied() -> None:
    content = request(blank(100)).SerializeToString()
    _, (tensor,) = split(content)
    assert tensor.obj is content


def test_fields_of_every_kind_are_kept_in_order() -> None:
    content = b"\x08\x96\x01\x11" + bytes(8) + b"\x12\x02hi\x1d" + bytes(4)
    assert split(content) == (content, [])
    assert split(b"") == (b"", [])


@pytest.mark.parametrize(
    "content",
    [
        b"\x08",  # no value
        b"\x08" + b"\xff" * 20,  # a number without an end
        b"\x3a\x05abcd",  # a tensor that is cut
        b"\x3a" + b"\xff" * 9 + b"\x01",  # of a size beyond everything
        b"\x11" + bytes(7),
        b"\x1d" + bytes(3),
        b"\x0b\x0c",  # a group, which protobuf had once
        b"\x0e",
    ],
)
def test_what_is_no_message(content: bytes) -> None:
    with pytest.raises(ApiError, match="no ModelInferRequest"):
        split(content)


def test_millions_of_empty_fields() -> None:
    """Protobuf would make an object of each."""
    with pytest.raises(ApiError, match="more than 256 fields"):
        split(b"\x2a\x00" * 1_000_000)
    assert split(b"\x2a\x00" * 256)[0] == b"\x2a\x00" * 256


@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    """Split or refused; and nothing is lost."""
    try:
        rest, raw = split(content)
    except ApiError:
        return
    size = sum(len(tensor) for tensor in raw)
    assert len(rest) + size <= len(content)
    assert len(content) - len(rest) - size <= 20 * len(raw)
