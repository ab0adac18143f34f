"""Predictions over all test images."""

from __future__ import annotations

import numpy as np

from eps_deploy.bench.accuracy import answers, passes
from eps_deploy.engines.base import Images, Logits


def test_every_batch_size_sees_every_image() -> None:
    images = np.zeros((33, 1, 8, 8), np.uint8)
    seen: list[int] = []

    def infer(batch: Images) -> Logits:
        seen.append(len(batch))
        return np.zeros((len(batch), 10), np.float32)

    assert [len(logits) for logits in passes(infer, images, (1, 2, 7, 32))] == [33] * 4
    assert seen == [1] * 33 + [2] * 16 + [1] + [7] * 4 + [5] + [32, 1]


def test_every_image_counts_once_also_in_the_last_batch() -> None:
    images = np.arange(150, dtype=np.uint8).reshape(150, 1, 1, 1)
    labels = (np.arange(150) % 3).astype(np.int64)

    def infer(batch: Images) -> Logits:
        guess = batch[:, 0, 0, 0] % 3
        guess[batch[:, 0, 0, 0] == 149] = 0  # 149 % 3 is 2
        return np.eye(3, dtype=np.float32)[guess]

    assert np.flatnonzero(~answers(infer, images, labels, 128).correct).tolist() == [149]
