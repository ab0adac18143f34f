"""Deploy a compact network from memory: the bundle of a notebook, without files before it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from eps_compact import Compaction
from eps_core.cli import Log
from eps_core.errors import ConfigError, DataError
from eps_deploy.pipeline import builder
from eps_deploy.pipeline.inputs import Inputs
from eps_deploy.pipeline.options import Options
from eps_deploy.pipeline.pipeline import TestSet, make_bundle
from eps_deploy.pipeline.write import BundleWriter
from eps_deploy.precision import PRECISIONS
from eps_train.data.inputs import Batch, pixels


def deploy(
    compaction: Compaction,
    heldout: Iterable[Batch],
    *,
    engine: Literal["ort", "trt"] = "ort",
    output: str | Path = "bundle",
    precision: str = "fp32",
    log: Log = lambda line: None,
    **options: Any,
) -> dict[str, Any]:
    """Write a bundle of a compact network and return its report, as `eps-deploy` does.

    Args:
        compaction: from `eps_compact.compact_pruner`.
        heldout: batches of inputs, normalised as in training, and labels, for the accuracy and the
            comparison of logits; data that the training did not see.
        engine: ONNX Runtime or TensorRT.
        output: folder to write.
        precision: `fp32`, `tf32`, `fp16` or `bf16`.
        log: receives a line for each step.
        options: others of `eps-deploy`, by their names in Python: `max_accuracy_drop=1.0`,
            `time_budget=10.0`, `name="flowers"`, `force=True`.

    Raises:
        ConfigError: an option cannot be used.
        DataError: `heldout` is empty, without labels, or not normalised as the pruner was told.
    """
    if precision not in PRECISIONS or PRECISIONS[precision].quantized:
        raise ConfigError(
            f"precision={precision!r}: give fp32, tf32, fp16 or bf16; int8 is calibrated on"
            " training images, which eps-deploy reads from files"
        )
    try:
        chosen = Options(
            model=Path("compact.pt"),
            engine=engine,
            output=Path(output),
            precision=PRECISIONS[precision],
            command="eps_deploy.deploy()",
            **options,
        )
    except TypeError as error:
        raise ConfigError(f"deploy(): {error}") from None
    found = pixels(heldout, compaction.artifact.data)
    if isinstance(found, torch.Tensor):
        raise DataError("heldout: has no labels; yield (images, labels)")
    writer = BundleWriter(chosen.output, force=chosen.force)
    builder.require(chosen)
    inputs = Inputs(
        compact=compaction.artifact,
        checkpoint=compaction.checkpoint,
        baseline=None,
        baseline_path=None,
    )
    test = TestSet(images=found.images.numpy(), labels=found.labels.numpy())
    return make_bundle(chosen, writer, inputs, test, None, log)
