"""What every engine offers, whatever runs underneath. No torch here: servers have none."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from eps_core.errors import DataError, EpsError

INPUT_NAME = "images"  # uint8 [N, C, H, W]
OUTPUT_NAME = "logits"  # float32 [N, classes]

Images = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]


class EngineError(EpsError):
    """An engine that cannot be made, or does not run where it was told to."""


class Engine(Protocol):
    """A loaded network, ready to run; a context manager that frees it.

    Any thread may call it, and several at once.

    Attributes:
        input_shape: shape `[C, H, W]` of one image.
        classes: number of logits.
        max_batch: largest batch that `infer` takes.
    """

    @property
    def input_shape(self) -> tuple[int, int, int]: ...

    @property
    def classes(self) -> int: ...

    @property
    def max_batch(self) -> int: ...

    def infer(self, images: Images) -> Logits:
        """Logits float32 `[N, classes]` of images uint8 `[N, C, H, W]`, 1 <= N <= max_batch.

        Raises DataError for images of another type or shape, EngineError when the engine fails.
        """

    def describe(self) -> dict[str, Any]:
        """Plain data for manifest and report: name, runtime and its version, provider, threads."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, *_: object) -> None: ...


def finite_rows(logits: Logits) -> npt.NDArray[np.bool_]:
    """bool `[N]`: whether all logits of an image are finite. What is not must never be answered."""
    rows: npt.NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(logits), axis=1)
    return rows


def check_images(images: Images, input_shape: tuple[int, int, int], max_batch: int) -> None:
    """Raise DataError unless `images` is uint8 `[N, *input_shape]` with 1 <= N <= max_batch."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise DataError(f"images must be a uint8 array of raw pixels 0..255, not {kind}")
    if images.ndim != 4 or images.shape[1:] != input_shape:
        wanted = ", ".join(str(size) for size in input_shape)
        raise DataError(f"images must have the shape [N, {wanted}], not {list(images.shape)}")
    if not 1 <= len(images) <= max_batch:
        raise DataError(f"a batch must hold 1 to {max_batch} images, not {len(images)}")
