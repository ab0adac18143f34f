"""The outermost layer of a ModelInferRequest, read without protobuf.

So the pixels stay where they are, without a copy, and what protobuf is given is bounded before it
makes objects of it: two bytes of an empty tensor become a hundred in memory.

Source: protobuf's "Encoding". A message is a row of fields, and a field a tag (number and kind) and
a value.
"""

from __future__ import annotations

from eps_deploy.serving.protocol import ApiError

_RAW = 7 << 3 | 2  # the tag of raw_input_contents: a field of bytes
_MOST_FIELDS = 256  # a tensor, an output and each parameter are one
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


def split(content: bytes) -> tuple[bytes, list[memoryview]]:
    """A message without its raw tensors, still encoded, and the raw tensors as views of it.

    Raises Refusal for what is no protobuf message, and for more fields than any request needs.
    """
    view = memoryview(content)
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    end = 0
    while end < len(content):
        if len(rest) + len(raw) == _MOST_FIELDS:
            raise ApiError(f"the message has more than {_MOST_FIELDS} fields")
        begin = end
        tag, start = _varint(content, begin)
        start, end = _value(content, tag & 7, start)
        if end > len(content):
            raise _broken()
        if tag == _RAW:
            raw.append(view[start:end])
        else:
            rest.append(view[begin:end])
    return b"".join(rest), raw


def _value(content: bytes, kind: int, at: int) -> tuple[int, int]:
    """Where a value begins and ends."""
    if kind == _BYTES:
        size, at = _varint(content, at)
        return at, at + size
    if kind == _VARINT:
        return at, _varint(content, at)[1]
    if kind == _EIGHT_BYTES:
        return at, at + 8
    if kind == _FOUR_BYTES:
        return at, at + 4
    raise _broken()


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of up to ten bytes, seven bits in each, and where it ends."""
    number = 0
    for count, byte in enumerate(content[at : at + 10]):
        number |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return number, at + count + 1
    raise _broken()


def _broken() -> ApiError:
    return ApiError("the message is no ModelInferRequest of the Open Inference Protocol")
