"""What a bundle holds besides its models: real samples with their logits, pictures, facts."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from PIL import Image

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, EngineError, Images, Logits
from eps_deploy.engines.trt.sidecar import SIDECAR, Sidecar
from eps_deploy.exporting.onnx_types import executed_types, layer_types
from eps_deploy.exporting.repair import Repair
from eps_deploy.measuring.latency import Picture
from eps_deploy.networks import Models
from eps_deploy.options import Options
from eps_deploy.reporting import report
from eps_deploy.runtimes import Sides
from eps_deploy.sources import Sources
from eps_deploy.triton import Kind, Served
from eps_train import normalization
from eps_train.data import DataIdentity

EXAMPLES = 10


def write_samples(
    path: Path,
    images: Images,
    labels: npt.NDArray[np.int64],
    indices: npt.NDArray[np.int64],
    logits: Logits,
) -> None:
    """Images of the test part and the logits that the compact network gave them in torch.

    Arrays: `images` uint8 `[N, C, H, W]`, `labels` and `indices` (in the test part) int64 `[N]`,
    `logits` float32 `[N, classes]`.
    """
    np.savez(path, images=images, labels=labels, indices=indices, logits=logits)


def write_examples(
    folder: Path, images: Images, labels: npt.NDArray[np.int64], classes: Sequence[str]
) -> list[Path]:
    """The first test image of up to ten classes as PNG files named after label and index."""
    folder.mkdir()
    chosen = np.linspace(0, len(classes) - 1, min(EXAMPLES, len(classes))).round().astype(int)
    written = []
    for label in chosen.tolist():
        members = np.flatnonzero(labels == label)
        if len(members):
            name = re.sub(r"[^A-Za-z0-9_-]+", "_", classes[label])
            path = folder / f"label-{name}-test-{members[0]:04d}.png"
            path.write_bytes(png(images[members[0]]))
            written.append(path)
    return written


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Raw pixels `[C, H, W]` as a picture, without loss."""
    file = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def picture(pixels: npt.NDArray[np.uint8], data: DataIdentity) -> Picture:
    """A test image as a server gets it."""
    return Picture(content=png(pixels), preprocessing=data.preprocessing, labels=data.classes)


def precision_entry(
    options: Options, models: Models, sides: Sides, repair: Repair | None
) -> dict[str, Any]:
    """What was asked for, what stands in `model.onnx`, and what the runtime makes of it."""
    types = layer_types(onnx.load_from_string(models.compact))
    executed = None
    if options.engine == "ort":
        executed = _executed(options, models)
    elif sides.files:
        executed = dict(Sidecar.from_dict(json.loads(sides.files[SIDECAR])).layers) or None
    return report.precision_entry(
        options.precision,
        graph=dict(sorted(Counter(types.values()).items())),
        executed=executed,
        calibration=models.calibration,
        kept=models.kept,
        repair=repair,
    )


def _executed(options: Options, models: Models) -> dict[str, int] | None:
    """None where ONNX Runtime does not tell: it refuses to save what TensorRT compiled."""
    if options.provider == "tensorrt":
        return None
    try:
        return executed_types(models.compact, provider=options.provider)
    except EngineError:
        return None  # everything was measured by now: no reason to end a deployment


def served(options: Options, data: DataIdentity, sides: Sides) -> Served:
    """What Triton has to know."""
    capability = None
    if SIDECAR in sides.files:
        sidecar = Sidecar.from_dict(json.loads(sides.files[SIDECAR]))
        capability = sidecar.host.compute_capability
    on_cpu = options.engine == "ort" and options.provider == "cpu"
    return Served(
        input_shape=data.input_shape,
        labels=data.classes,
        preprocessing=data.preprocessing.described(),
        max_batch=options.max_batch,
        kind=_kind(options),
        threads=options.threads if on_cpu else None,
        capability=capability,
    )


def _kind(options: Options) -> Kind:
    """Where Triton's ONNX Runtime runs `model.onnx`; beside a plan, wherever there is room."""
    if options.engine == "trt":
        return "KIND_AUTO"
    return "KIND_CPU" if options.provider == "cpu" else "KIND_GPU"


def manifest_fields(
    options: Options, sources: Sources, engine: Mapping[str, Any], file: str
) -> dict[str, Any]:
    """`manifest.json` but for the files' hashes, which the writer adds.

    `engine` is what the engine says of itself, `file` what it loads.
    """
    data: DataIdentity = sources.compact.data
    return {
        "name": options.name,
        "input": {
            "name": INPUT_NAME,
            "dtype": "uint8",
            "shape": ["N", *data.input_shape],
            "layout": "NCHW",
            "color": data.preprocessing.color,
            "range": [0, 255],
        },
        "output": {"name": OUTPUT_NAME, "dtype": "float32", "shape": ["N", len(data.classes)]},
        "preprocessing": data.preprocessing.to_dict(),
        # For clients that send raw pixels: other libraries call something else by this name.
        "resampling": {
            "interpolation": data.preprocessing.interpolation,
            "antialias": data.preprocessing.antialias,
            "reference": "Pillow",
        },
        # Applied inside the network; recorded for whoever wants to know.
        "normalization": normalization.summary(data.mean, data.std),
        "labels": list(data.classes),
        "precision": options.precision.name,
        "engine": {**engine, "file": file},
        "source": {
            "compact_digest": sources.compact.digest,
            "checkpoint_digest": sources.checkpoint.digest,
            "baseline_digest": sources.baseline.digest if sources.baseline else None,
        },
        "data": {
            "name": data.name,
            "sha256": data.sha256,
            "split_seed": data.split_seed,
            "sizes": dict(data.sizes),
        },
        "versions": {**sources.compact.versions, "eps_resnet": package_version("eps-resnet")},
    }
