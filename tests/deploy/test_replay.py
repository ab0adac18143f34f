"""Replay of the stored samples: an engine that differs from torch is not served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eps_deploy.bundle import load_bundle, open_engine, prove, replay
from eps_deploy.engines.base import EngineError, Images, Logits


class Bent:
    """An engine whose logits are bent; it remembers the sizes of its batches."""

    def __init__(self, inner: Any, bend: Any, **facts: str) -> None:
        self._inner, self._bend, self._facts = inner, bend, facts
        self.max_batch, self.classes = inner.max_batch, inner.classes
        self.input_shape = inner.input_shape
        self.sizes: set[int] = set()

    def infer(self, images: Images) -> Logits:
        self.sizes.add(len(images))
        logits: Logits = self._bend(self._inner.infer(images))
        return logits

    def describe(self) -> dict[str, Any]:
        return {**self._inner.describe(), **self._facts}

    def __enter__(self) -> Bent:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_an_engine_that_equals_torch(deployed: Path) -> None:
    bundle = load_bundle(deployed / "bundle")
    with open_engine(bundle) as engine:
        watched = Bent(engine, lambda logits: logits)
        told = prove(bundle, watched, "here")
        assert told.passed
        assert watched.sizes == {1, 2, 32}


@pytest.mark.parametrize(
    ("provider", "sizes"),
    [
        ("TensorRT", {1, 2, 4, 8, 16, 31, 32}),
        ("CUDAExecutionProvider", {1, 2, 4, 8, 16, 31, 32}),
        ("TensorrtExecutionProvider", set(range(1, 33))),
    ],
)
def test_a_gpu_prepares_each_batch_size_before_a_client_needs_it(
    deployed: Path, provider: str, sizes: set[int]
) -> None:
    """Those that run there: other batches are padded, except by ONNX Runtime's TensorRT."""
    bundle = load_bundle(deployed / "bundle")
    with open_engine(bundle) as engine:
        watched = Bent(engine, lambda logits: logits, provider=provider)
        prove(bundle, watched, "here")
        assert watched.sizes == sizes
        watched.sizes.clear()
        replay(bundle, watched, "here")
        assert watched.sizes == sizes


@pytest.mark.parametrize(
    ("bend", "told"),
    [
        (lambda logits: logits * 1.001, "differs from torch by"),
        (lambda logits: np.roll(logits, 1, axis=1), "differs from torch by"),
        (lambda logits: np.full_like(logits, np.nan), "not finite"),
    ],
)
def test_an_engine_that_differs_from_torch(deployed: Path, bend: Any, told: str) -> None:
    bundle = load_bundle(deployed / "bundle")
    with open_engine(bundle) as engine, pytest.raises(EngineError, match=told):
        prove(bundle, Bent(engine, bend), "here")


def test_the_limit_of_int8(deployed: Path) -> None:
    """They may round otherwise than the file says; a network that answers otherwise is refused."""
    bundle = load_bundle(deployed / "bundle")
    bundle = replace(bundle, manifest={**bundle.manifest, "precision": "int8"})
    with open_engine(bundle) as engine:
        assert prove(bundle, Bent(engine, lambda logits: logits * 1.2), "here").limit == 0.25
        with pytest.raises(EngineError, match=r"0\.25 is the limit for int8"):
            prove(bundle, Bent(engine, lambda logits: logits * 1.3), "here")
