"""The interface of an inference engine. This module does not import torch: servers have none."""

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
    """An engine cannot be created, or does not run on the device asked for."""


class Engine(Protocol):
    """A loaded network; a context manager that frees it.

    It is thread-safe: several threads may call `infer` at once.
    """

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape `[C, H, W]` of one image."""

    @property
    def classes(self) -> int:
        """Number of logits."""

    @property
    def max_batch(self) -> int:
        """Largest batch of `infer`."""

    def infer(self, images: Images) -> Logits:
        """Logits float32 `[N, classes]` of images uint8 `[N, C, H, W]`, 1 <= N <= max_batch.

        Raises DataError for images of another type or shape, EngineError when the engine fails.
        """

    def describe(self) -> dict[str, Any]:
        """Name, runtime and its version, provider and threads, as JSON for manifest and report."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, *_: object) -> None: ...


def finite_rows(logits: Logits) -> npt.NDArray[np.bool_]:
    """Whether all logits of each image are finite, bool `[N]`. A server never answers others."""
    rows: npt.NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(logits), axis=1)
    return rows


def padded_sizes(max_batch: int) -> tuple[int, ...]:
    """Batch sizes that an engine with CUDA graphs runs: 1, 2, 4, ... and the largest.

    A batch in between is padded to the next of them, so that few graphs serve all batches.
    """
    powers = [1 << power for power in range(max_batch.bit_length())]
    return tuple(dict.fromkeys((*powers, max_batch)))


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
