"""How far the activations of a network reach, measured on real images, for int8 to cover it.

Quantisation is symmetric, so a tensor's range is one number: the magnitude that becomes 127.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch

from eps_deploy.engines.base import INPUT_NAME, Images
from eps_deploy.engines.ort import open_session
from eps_deploy.exporting.onnx_types import LAYERS
from eps_train.data import Data
from eps_train.errors import DataError

Method = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[Method, ...] = ("minmax", "entropy", "percentile")
# Measured on a network of 11 blocks (Fashion-MNIST) and one of 18 (digits), three draws each, by
# "minmax": the root mean square error was up to 6.7 times that of 512 images with 16 of them, 2.9
# times with 32, 1.5 times with 100.
MIN_SAMPLES = 100
_SEED = 0
_BATCH = 4  # images in flight: the activations of all layers lie in memory
_BINS = 2048
_LEVELS = 128  # magnitudes 0..127
_STRIDE = 16  # bins between the candidates of the entropy method
_PERCENTILE = 99.99

Magnitudes = npt.NDArray[np.float32]
Counts = npt.NDArray[np.float64]


def pick(data: Data, samples: int) -> Images:
    """Images of the training part, without repetition, as evaluation preprocesses them.

    Args:
        data: the data set.
        samples: how many; all there are, if there are fewer.

    Returns:
        Raw pixels uint8 `[samples, C, H, W]`, which an exported network takes as they are.

    Raises:
        DataError: too few images.
    """
    _enough(samples, f"--calibration-samples {samples}")
    part = data.train
    _enough(len(part), f"data set {data.identity.name}: {len(part)} training images")
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(_SEED))
    images: Images = part[order[:samples].sort().values].images.numpy()
    return images


def check_enough(images: Images) -> None:
    """Raise DataError if `images` are too few to read ranges off them."""
    _enough(len(images), f"{len(images)} calibration images")


def digest(images: Images) -> str:
    """SHA-256 of shape and pixels."""
    hashed = hashlib.sha256(repr(images.shape).encode())
    hashed.update(np.ascontiguousarray(images).data)
    return hashed.hexdigest()


def ranges(
    model: onnx.ModelProto, values: Iterable[str], images: Images, method: Method
) -> dict[str, float]:
    """The magnitude that int8 must reach, for each of the `values` of `model`, by their names.

    - `minmax`: the largest that occurs;
    - `percentile`: what 99.99 % of the values stay within;
    - `entropy`: the cut whose quantised distribution is nearest to the real one, by the
      Kullback-Leibler divergence, as TensorRT's calibration had it (Migacz, GTC 2017).

    What is computed from the pixels without any layer is always covered whole: pixels have no
    outliers, and white is as likely as grey.

    Raises DataError when a value is not finite on one of the images.
    """
    names = sorted(set(values))
    largest = dict.fromkeys(names, 0.0)
    for name, magnitudes in _activations(model, names, images):
        largest[name] = max(largest[name], float(magnitudes.max(initial=0.0)))
    if broken := [name for name, value in largest.items() if not np.isfinite(value)]:
        raise DataError(
            f"calibration: {broken[0]} is not finite on the calibration images;"
            " use --bf16 or --fp32"
        )
    if method == "minmax":
        return largest
    choose = {"entropy": _by_entropy, "percentile": _by_percentile}[method]
    cut = [name for name in names if largest[name] > 0 and name not in _pixels(model)]
    counts = {name: np.zeros(_BINS) for name in cut}
    if cut:
        for name, magnitudes in _activations(model, cut, images):
            bins = (magnitudes.ravel() * (_BINS / largest[name])).astype(np.int64)
            np.minimum(bins, _BINS - 1, out=bins)
            counts[name] += np.bincount(bins, minlength=_BINS)
    return largest | {name: largest[name] * choose(counts[name]) / _BINS for name in cut}


def _enough(count: int, what: str) -> None:
    if count < MIN_SAMPLES:
        raise DataError(
            f"{what}: too few for int8, whose ranges would be those of chance; at least"
            f" {MIN_SAMPLES} are needed"
        )


def _activations(
    model: onnx.ModelProto, names: Sequence[str], images: Images
) -> Iterator[tuple[str, Magnitudes]]:
    """Name and magnitudes of each value, batch by batch."""
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    known = {port.name for port in observed.graph.output}
    observed.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in names if name not in known
    )
    session = open_session(
        observed.SerializeToString(), provider="cpu", threads=1, name="calibration"
    )
    for start in range(0, len(images), _BATCH):
        values = session.run(names, {INPUT_NAME: images[start : start + _BATCH]})
        for name, value in zip(names, values, strict=True):
            yield name, np.abs(value.astype(np.float32))


def _pixels(model: onnx.ModelProto) -> set[str]:
    """Values that no weights have touched yet."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found = {INPUT_NAME}
    for node in model.graph.node:
        if node.op_type not in LAYERS and found.issuperset(set(node.input) - constants):
            found.update(node.output)
    return found


def _by_percentile(counts: Counts) -> int:
    """How many bins hold the percentile."""
    share = np.cumsum(counts) / max(counts.sum(), 1.0)
    return int(np.searchsorted(share, _PERCENTILE / 100)) + 1


def _by_entropy(counts: Counts) -> int:
    """After how many bins to cut."""
    if not counts.any():
        return _BINS
    # Zeros are exact in any scale: the pile of them behind a ReLU would outweigh all else.
    counts = counts.copy()
    counts[0] = counts[1]
    candidates = range(_LEVELS, _BINS + 1, _STRIDE)
    return min(candidates, key=lambda cut: _divergence(counts, cut))


def _divergence(counts: Counts, cut: int) -> float:
    """Kullback-Leibler divergence of the distribution from its form quantised up to `cut`."""
    real = counts[:cut].copy()
    real[-1] += counts[cut:].sum()  # what lies beyond is clipped to the end
    level = np.arange(cut) * _LEVELS // cut
    present = counts[:cut] > 0
    mass = np.bincount(level, weights=counts[:cut], minlength=_LEVELS)
    spread = np.bincount(level, weights=present, minlength=_LEVELS)
    quantized = np.where(present, (mass / np.maximum(spread, 1))[level], 0.0)
    p, q = real / real.sum(), quantized / max(quantized.sum(), 1.0)
    if (q[p > 0] == 0).any():
        return float("inf")
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
