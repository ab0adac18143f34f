"""Mean and deviation that a network's input is normalised with, found in the training part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from eps_train.errors import ConfigError, DataError
from eps_train.files import FileSet
from eps_train.images import ImageSet, Part

Image = tuple[tuple[tuple[float, ...], ...], ...]
"""Pixels `[C][H][W]` as plain data, which every file of ours can hold and compare."""

Mean = tuple[float, ...] | Image
"""Per channel `[C]`, or a mean image."""

PIXEL_SCALE = 128.0  # what the paper divides small images by
_SAMPLE = 1_000  # images that stand for a part on disk
_SEED = 0


def measure(train: Part, kind: str) -> tuple[Mean, tuple[float, ...]]:
    """Mean and deviation of a training part, in pixel units 0..255.

    Args:
        train: a part on disk is judged by 1,000 of its images, the same every time.
        kind: `channel` for mean and deviation of every channel; `pixel` for the mean image, and 128
            for every channel, as in the paper (CIFAR and SVHN).

    Raises:
        ConfigError: `pixel`, for a part that does not lie in memory.
        DataError: an image cannot be read, or all of them are one colour.
    """
    if kind == "pixel":
        if not isinstance(train, ImageSet):
            raise ConfigError(
                "--normalization pixel: needs a set that fits in memory; use channel with this one"
            )
        mean = _mean_image(train.images)
        lowest, highest = (f(train.images, dim=(0, 2, 3)) for f in (torch.amin, torch.amax))
        _refuse_one_color(lowest.ne(highest).tolist(), lowest.tolist())
        return mean, (PIXEL_SCALE,) * len(mean)
    if isinstance(train, ImageSet):
        return _channels(train.batches(_SAMPLE))
    assert isinstance(train, FileSet)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(_SEED))[:_SAMPLE]
    return _channels(train[chosen.sort().values].chunks())


def summary(mean: Mean, std: tuple[float, ...]) -> dict[str, Any]:
    """Mean and deviation as plain data, for whoever wants to know; lists in place of tuples.

    `kind` as :func:`measure` takes it, `mean` and `std` per channel. Of a mean image `mean` is its
    mean: the thousands of numbers themselves are in the network.
    """
    if isinstance(mean[0], tuple):
        image = torch.tensor(mean, dtype=torch.float64)
        return {"kind": "pixel", "mean": image.mean(dim=(1, 2)).tolist(), "std": list(std)}
    return {"kind": "channel", "mean": list(mean), "std": list(std)}


def kind_of(mean: Mean) -> str:
    """`pixel` or `channel`, as :func:`measure` takes it."""
    return "pixel" if isinstance(mean[0], tuple) else "channel"


def frozen(value: Any) -> Any:
    """Lists, at any depth, as tuples: a mean read back from plain data."""
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def thawed(value: Any) -> Any:
    """Inverse of :func:`frozen`."""
    return list(map(thawed, value)) if isinstance(value, tuple) else value


def _channels(parts: Iterable[ImageSet]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel, over all images together."""
    values = torch.arange(256, dtype=torch.float64)
    # From the histogram: exact, and no float copy of the whole set.
    histograms = sum(_histograms(part.images) for part in parts)
    assert isinstance(histograms, Tensor)
    _refuse_one_color(histograms.gt(0).sum(dim=1).gt(1).tolist(), histograms.argmax(dim=1).tolist())
    means, deviations = [], []
    for counts in histograms:
        mean = (counts * values).sum() / counts.sum()
        variance = (counts * (values - mean) ** 2).sum() / (counts.sum() - 1).clamp_min(1)
        means.append(mean.item())
        deviations.append(max(variance.sqrt().item(), 1.0))
    return tuple(means), tuple(deviations)


def _refuse_one_color(varies: Sequence[bool], color: Sequence[int]) -> None:
    """Raise DataError unless one of the channels varies."""
    if not any(varies):
        value = ", ".join(map(str, color))
        raise DataError(
            f"its training images are all one colour (every pixel is {value} of 255): there is"
            " nothing to learn from; look at the files"
        )


def _histograms(images: Tensor) -> Tensor:
    """How often each value occurs, float64 `[C, 256]`, in uint8 `[N, C, H, W]`."""
    channels = [channel.flatten().bincount(minlength=256) for channel in images.unbind(dim=1)]
    return torch.stack(channels).to(torch.float64)


def _mean_image(images: Tensor) -> Image:
    """Mean over uint8 `[N, C, H, W]`, exact but for one rounding."""
    mean = images.sum(dim=0, dtype=torch.int64).to(torch.float64) / len(images)
    found: Image = frozen(mean.tolist())
    return found
