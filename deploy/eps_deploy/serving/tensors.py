"""Pixels from a request: raw bytes, or numbers, nested or flat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from eps_deploy.engines.base import INPUT_NAME, Images
from eps_deploy.serving.refusals import Refusal


def from_bytes(content: memoryview, shape: tuple[int, ...]) -> Images:
    """Row-major pixels as they are, without a copy. Raises Refusal for another number of them."""
    wanted = math.prod(shape)
    if len(content) != wanted:
        raise Refusal(
            f"{INPUT_NAME!r} of shape {list(shape)} has {wanted} bytes, not {len(content)}"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def from_json(data: Any, shape: tuple[int, ...]) -> Images:
    """Pixels from JSON's lists. Raises Refusal for another shape, or what is no whole 0..255."""
    if not isinstance(data, list):
        raise Refusal(f"{INPUT_NAME!r} needs data, a list of pixels, or binary_data_size")
    flat = _flat(data, shape) if data and isinstance(data[0], list) else data
    _check_count(len(flat), shape)
    if set(map(type, flat)) != {int}:  # True would pass for 1
        raise Refusal(f"the pixels of {INPUT_NAME!r} must be whole numbers")
    return from_numbers(flat, shape)


def from_numbers(numbers: Sequence[int], shape: tuple[int, ...]) -> Images:
    """Pixels from a flat row of numbers. Raises Refusal for another number of them, or range."""
    _check_count(len(numbers), shape)
    try:
        pixels = bytes(numbers)
    except ValueError:
        raise Refusal(f"the pixels of {INPUT_NAME!r} must lie between 0 and 255") from None
    return np.frombuffer(pixels, dtype=np.uint8).reshape(shape)


def _check_count(count: int, shape: tuple[int, ...]) -> None:
    wanted = math.prod(shape)
    if count != wanted:
        raise Refusal(f"{INPUT_NAME!r} of shape {list(shape)} has {wanted} pixels, not {count}")


def _flat(data: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """The numbers of nested lists that have this very shape."""
    level: list[Any] = [data]
    for axis, size in enumerate(shape):
        if not all(type(part) is list and len(part) == size for part in level):
            raise Refusal(
                f"the data of {INPUT_NAME!r} must be nested as its shape {list(shape)} says,"
                f" or flat; axis {axis} is not"
            )
        level = list(chain.from_iterable(level))
    return level
