"""What a bundle holds besides its models: real samples with their logits, pictures, facts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Engine, Images, Logits
from eps_deploy.sources import Sources
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
            pixels = images[members[0]]
            Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(path)
            written.append(path)
    return written


def manifest_fields(sources: Sources, engine: Engine, *, precision: str) -> dict[str, Any]:
    """`manifest.json` but for the files' hashes, which the writer adds."""
    data: DataIdentity = sources.compact.data
    return {
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
        # Applied inside the network; recorded for whoever wants to know.
        "normalization": normalization.summary(data.mean, data.std),
        "labels": list(data.classes),
        "precision": precision,
        "engine": {**engine.describe(), "file": "model.onnx"},
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
