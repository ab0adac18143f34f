"""A fake engine that records its batches and can be blocked."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from eps_deploy.engines.base import EngineError, Images, Logits, check_images

SHAPE = (1, 2, 2)


def numbered(*values: int) -> Images:
    """One image for each number, by which it can be told apart."""
    return np.repeat(np.array(values, dtype=np.uint8), 4).reshape(-1, *SHAPE)


class FakeEngine:
    """Its logits are the image's first pixel and twice that.

    Attributes:
        batches: the first pixels of each batch, in order.
        open_gate: when not set, batches wait; `entered` tells that one does.
        fails: whether it raises EngineError.
        bad: what the first logit is of images with this pixel.
    """

    input_shape = SHAPE
    classes = 2

    def __init__(self, max_batch: int = 4) -> None:
        self.max_batch = max_batch
        self.batches: list[list[int]] = []
        self.open_gate = threading.Event()
        self.open_gate.set()
        self.entered = threading.Semaphore(0)
        self.fails = False
        self.bad: dict[int, float] = {}
        self.closed = False

    def infer(self, images: Images) -> Logits:
        check_images(images, SHAPE, self.max_batch)
        first = images[:, 0, 0, 0]
        self.batches.append(first.tolist())
        self.entered.release()
        assert self.open_gate.wait(60)
        if self.fails:
            raise EngineError("the GPU fell off the bus at /dev/nvidia0")
        logits = np.stack([first, first * 2.0], axis=1).astype(np.float32)
        for pixel, value in self.bad.items():
            logits[first == pixel, 0] = value
        return logits

    def describe(self) -> dict[str, Any]:
        return {"name": "fake"}

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True
