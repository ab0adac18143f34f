"""Warm-up and proof in one: the stored samples through an engine, before a client is let in."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt

from eps_deploy.bundle import Bundle
from eps_deploy.engines.base import Engine, EngineError, Images, Logits
from eps_deploy.measuring import parity
from eps_deploy.measuring.limits import PARITY_LIMITS
from eps_deploy.measuring.parity import Parity

SAMPLES = "samples.npz"


def prove(bundle: Bundle, engine: Engine, stage: str) -> Parity:
    """Warm up, and compare with torch's logits.

    Raises EngineError when the engine fails, or answers something else than torch did.
    """
    images, logits, indices = _samples(bundle, engine)
    batches = _batches(engine)
    answers = parity.passes(engine.infer, images, batches)
    expected = [logits] * len(batches)
    limit = PARITY_LIMITS[bundle.manifest["precision"]]
    told = parity.compare(stage, expected, answers, indices.tolist(), limit, batches)
    if told.relative is None:
        raise EngineError("on the stored samples some of the engine's logits are not finite")
    if told.passed is False:
        raise EngineError(
            f"on the stored samples the engine differs from torch by {told.relative:.2g} of the"
            f" largest logit, and {told.limit:g} is the limit for {bundle.manifest['precision']};"
            " deploy the network again on this machine"
        )
    return told


def warm(bundle: Bundle, engine: Engine) -> None:
    """Run the bundle's samples, of which nobody knows what this engine must answer."""
    parity.passes(engine.infer, _samples(bundle, engine)[0], _batches(engine))


def _samples(bundle: Bundle, engine: Engine) -> tuple[Images, Logits, npt.NDArray[np.int64]]:
    """Images, torch's logits and indices; so many that the largest batch is a full one."""
    with np.load(io.BytesIO(bundle.read(SAMPLES)), allow_pickle=False) as samples:
        images, logits, indices = samples["images"], samples["logits"], samples["indices"]
    if len(images) < engine.max_batch:
        repeat = np.arange(engine.max_batch) % len(images)
        images, logits, indices = images[repeat], logits[repeat], indices[repeat]
    return images, logits, indices


def _batches(engine: Engine) -> list[int]:
    """All sizes on a GPU: TensorRT and cuDNN prepare each of them when it first comes."""
    on_cpu = engine.describe().get("provider") == "CPUExecutionProvider"
    largest = engine.max_batch
    return sorted({1, min(2, largest), largest} if on_cpu else range(1, largest + 1))
