"""Deploy a compact network from memory: the bundle of a notebook, without files before it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from eps_compact import Compaction
from eps_core.cli import Log
from eps_core.errors import ConfigError, DataError, GraphError
from eps_deploy.engines.base import Images
from eps_deploy.engines.trt.build import BuildOptions
from eps_deploy.export.quantize import check_count
from eps_deploy.pipeline import builder
from eps_deploy.pipeline.inputs import Inputs
from eps_deploy.pipeline.options import Options
from eps_deploy.pipeline.pipeline import TestSet, make_bundle, refuse_without_baseline
from eps_deploy.pipeline.write import BundleWriter
from eps_deploy.precision import PRECISIONS
from eps_train.data.dataset import DataIdentity
from eps_train.data.inputs import Batch, pixels
from eps_train.gating import rewriting
from eps_train.models.spec import GraphSpec
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import answers

_OF_FILES = ("checkpoint", "data_root")  # options that name files, of which there are none here


def deploy(
    compaction: Compaction,
    heldout: Iterable[Batch],
    *,
    engine: Literal["ort", "trt"] = "ort",
    output: str | Path = "bundle",
    precision: str = "fp32",
    calibration: Iterable[Batch] | None = None,
    baseline: nn.Module | None = None,
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
        precision: `fp32`, `tf32`, `fp16`, `bf16`, `int8` or `int8-fp16`; TensorRT computes
            what is not quantised in fp16.
        calibration: for int8: batches of training images, normalised as in training, in random
            order; the first `calibration_samples` images are taken.
        baseline: the network that was trained without pruning, whose accuracy and latency are
            compared with; any module that torch.fx can trace. By default the latency is compared
            with the full depth, and no accuracy is.
        log: receives a line for each step.
        options: others of `eps-deploy`, by their names in Python: `max_accuracy_drop=1.0`,
            `time_budget=10.0`, `max_batch=8`, `repair=True`, `name="flowers"`, `force=True`.

    Raises:
        ConfigError: an option cannot be used.
        DataError: `heldout` or `calibration` is empty or not normalised as the pruner was told, or
            `heldout` has no labels.
        GraphError: `baseline` cannot be traced.
    """
    chosen = _options(engine, Path(output), precision, options)
    identity = compaction.artifact.data
    if chosen.precision.quantized != (calibration is not None):
        raise ConfigError(
            f"deploy(precision={precision!r}): give calibration=, batches of training images"
            if chosen.precision.quantized
            else f"deploy(calibration=): only applies to int8, not to precision={precision!r}"
        )
    found = pixels(heldout, identity)
    if isinstance(found, torch.Tensor):
        raise DataError("heldout: has no labels; yield (images, labels)")
    writer = BundleWriter(chosen.output, force=chosen.force)
    builder.require(chosen)
    inputs = Inputs(
        compact=compaction.artifact,
        checkpoint=compaction.checkpoint,
        baseline=None if baseline is None else _trained(baseline, identity),
        baseline_path=None,
    )
    refuse_without_baseline(chosen, inputs)
    images = None
    if calibration is not None:
        images = _calibration_images(calibration, identity, chosen.calibration_samples)
    test = TestSet(images=found.images.numpy(), labels=found.labels.numpy())
    return make_bundle(chosen, writer, inputs, test, images, log)


def _options(
    engine: Literal["ort", "trt"], output: Path, precision: str, options: dict[str, Any]
) -> Options:
    if precision == "int8" and engine == "trt":
        precision = "int8-fp16"
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r}: give {', '.join(PRECISIONS)}")
    for name in _OF_FILES:
        if name in options:
            raise ConfigError(f"deploy({name}=): only applies to eps-deploy, which reads files")
    building = {field.name for field in fields(BuildOptions)} & options.keys()
    try:
        return Options(
            model=Path("compact.pt"),
            engine=engine,
            output=output,
            precision=PRECISIONS[precision],
            plan=BuildOptions(**{name: options.pop(name) for name in building}),
            command="eps_deploy.deploy()",
            **options,
        )
    except TypeError as error:
        raise ConfigError(f"deploy(): {error}") from None


def _trained(baseline: nn.Module, identity: DataIdentity) -> Checkpoint:
    """A module as the checkpoint of a baseline.

    Raises:
        ConfigError: it has gates, or other logits than the compact network.
        GraphError: it cannot be traced or run.
    """
    try:
        # Copied and moved first: it is evaluated as it ships, and the caller's keeps its mode.
        graph = rewriting.trace(copy.deepcopy(baseline).cpu().eval(), one_mode=True)
    except GraphError as error:
        raise GraphError(f"deploy(baseline=): {error}") from None
    if rewriting.gates(graph):
        raise ConfigError("deploy(baseline=): has ε-gates; give a network that was never pruned")
    classes = len(identity.classes)
    blank = torch.zeros((2, *identity.input_shape))
    try:
        logits = answers(graph, [blank])[0]
    except Exception as error:  # whatever the module's own code raises
        line = " ".join(str(error).split()) or type(error).__name__
        size = "x".join(map(str, identity.input_shape))
        raise GraphError(f"deploy(baseline=): does not run on images of {size} ({line})") from error
    if logits.shape != (2, classes):
        raise ConfigError(
            f"deploy(baseline=): returns {'x'.join(map(str, logits.shape))} for 2 images, not"
            f" logits of 2x{classes}, as the compact network does"
        )
    return Checkpoint(
        network=GraphSpec(family="own", arguments={}, graph=graph),
        state=dict(graph.state_dict()),
        gates=[],
        data=identity,
        config={},
        metrics={},
    )


def _calibration_images(batches: Iterable[Batch], identity: DataIdentity, samples: int) -> Images:
    """The first images of some batches, uint8 `[N, C, H, W]`. Raises DataError for too few."""
    check_count(samples, f"calibration_samples={samples}")
    taken: list[torch.Tensor] = []
    for batch in batches:
        taken.append(batch if isinstance(batch, torch.Tensor) else batch[0])
        if sum(map(len, taken)) >= samples:
            break
    found = pixels(taken, identity, name="calibration")
    assert isinstance(found, torch.Tensor)
    check_count(len(found), f"calibration: {len(found)} images")
    images: Images = found[:samples].numpy()
    return images
