"""The networks of a deployment in torch, and as the ONNX files that engines are built from."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eps_deploy.engines.base import Images
from eps_deploy.exporting import calibration as calibrating
from eps_deploy.exporting.export import Deployed, export_onnx
from eps_deploy.exporting.quantize import quantize
from eps_deploy.exporting.repair import units
from eps_deploy.options import Options
from eps_deploy.sources import Sources
from eps_deploy.stages import Stages
from eps_train import graph
from eps_train.cost import cost
from eps_train.data import DataIdentity
from eps_train.precision import Precision

# What the bytes of an exported network depend on besides the network.
_EXPORTERS = ("eps-resnet", "torch", "onnx", "onnxscript")


@dataclass(frozen=True, kw_only=True, slots=True)
class Networks:
    """Each takes uint8 images; `baseline` is the trained one or the ε-network's full depth."""

    gated: Deployed
    compact: Deployed
    baseline: Deployed


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """The bytes of `model.onnx` and `baseline.onnx`, both in the same precision.

    `calibration` says on what int8 was calibrated: `samples`, `method`, `sha256` of the pixels;
    `kept` names the blocks that are in higher precision.
    """

    compact: bytes
    baseline: bytes
    calibration: dict[str, Any] | None = None
    kept: tuple[str, ...] = ()

    def files(self) -> dict[str, bytes]:
        """By their names in the bundle."""
        return {"model.onnx": self.compact, "baseline.onnx": self.baseline}

    def digests(self) -> dict[str, str]:
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files().items()}


def build(sources: Sources) -> Networks:
    """All three in evaluation mode on the CPU."""
    identity = sources.compact.data
    if sources.baseline is None:
        whole = sources.checkpoint.build_gated()
        baseline: nn.Module = graph.drop_taps(graph.drop_gates(whole))
    else:
        baseline = graph.drop_taps(sources.baseline.build_gated())
        identity = sources.baseline.data
    return Networks(
        gated=Deployed(sources.compact.gated(sources.checkpoint), sources.compact.data),
        compact=Deployed(sources.compact.build(), sources.compact.data),
        baseline=Deployed(baseline, identity),
    )


@contextmanager
def on_gpu(device: int, *networks: Deployed) -> Iterator[None]:
    """Compute these on the CUDA device of this index in the block, in float32 without TF32.

    Where torch sees no such device, nothing changes. Thousands of test images take a processor
    minutes to hours. Their logits differ by rounding: what must be equal is compared on the CPU.
    """
    if device >= torch.cuda.device_count():
        yield
        return
    target = torch.device("cuda", device)
    Precision("fp32", target)  # which switches TF32 off
    try:
        for network in networks:
            network.to(target)
        yield
    finally:
        for network in networks:
            network.to("cpu")
        torch.cuda.empty_cache()  # for the engine whose memory it is


def export(
    options: Options,
    sources: Sources,
    networks: Networks,
    calibration: Images | None,
    stages: Stages,
    kept: Sequence[str] = (),
) -> Models:
    """Both networks as ONNX files in the precision asked for, calibrated on the same images.

    Args:
        calibration: raw training images, uint8 `[N, C, H, W]`, for int8.
        kept: blocks of the compact network that stay in higher precision.
    """
    origin = sources.baseline or sources.checkpoint
    compact = _Source(
        networks.compact,
        sources.compact.data,
        sources.compact.digest,
        tuple(kept),
        sources.blocks(),
    )
    baseline = _Source(networks.baseline, origin.data, origin.digest)
    return Models(
        compact=_model(options, "model", compact, calibration, stages),
        baseline=_model(options, "baseline", baseline, calibration, stages),
        calibration=None if calibration is None else _described(options, calibration),
        kept=tuple(kept),
    )


@dataclass(frozen=True, slots=True)
class _Source:
    network: Deployed
    identity: DataIdentity
    digest: str
    kept: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()


def _described(options: Options, calibration: Images) -> dict[str, Any]:
    return {
        "samples": len(calibration),
        "method": options.calibration_method,
        "sha256": calibrating.digest(calibration),
    }


def _model(
    options: Options, name: str, source: _Source, calibration: Images | None, stages: Stages
) -> bytes:
    key = {
        "digest": source.digest,
        "precision": options.precision.name,
        "kept": () if options.precision.quantized else source.kept,
        "versions": {name: version(name) for name in _EXPORTERS},
    }
    path = f"{name}.onnx"

    def exported() -> bytes:
        with tempfile.TemporaryDirectory(prefix="eps-deploy-") as folder:
            export_onnx(
                source.network.network,
                source.identity,
                Path(folder) / path,
                precision=options.precision,
                source=source.digest,
                kept=() if options.precision.quantized else source.kept,
            )
            return (Path(folder) / path).read_bytes()

    model = stages.content(f"export-{name}", key, exported)
    if calibration is None or (
        source.kept and set(source.kept) >= set(units(model, source.blocks))
    ):
        return model
    return stages.content(
        f"quantize-{name}",
        key | _described(options, calibration) | {"kept": source.kept},
        lambda: quantize(
            model,
            calibration,
            options.precision,
            method=options.calibration_method,
            kept=source.kept,
        ),
    )


def size(sources: Sources, networks: Networks) -> dict[str, Any]:
    """Parameters and FLOPs of both networks, as `report.json` has them."""
    shape = sources.compact.data.input_shape
    baseline = cost(networks.baseline.network, shape)
    compact = cost(networks.compact.network, shape)
    return {
        "parameters": {"baseline": baseline.parameters, "compact": compact.parameters},
        "flops": {"baseline": baseline.flops, "compact": compact.flops},
    }
