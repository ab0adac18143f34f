"""Image data sets, split once and for good into training, validation and test parts.

Every set is held as raw uint8 pixels; what turns pixels into network input (`Preprocessing`, mean,
std) is recorded in its :class:`DataIdentity` and travels with the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eps_train.errors import ConfigError, DataError
from eps_train.preprocess import Preprocessing

SPLIT_SEED = 0  # one split for all runs: seeds are compared on the same images


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images uint8 `[N, C, H, W]` with labels int64 `[N]`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> ImageSet:
        return ImageSet(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device))

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels in order, `size` at a time; the last batch may be smaller."""
        yield from zip(self.images.split(size), self.labels.split(size), strict=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataIdentity:
    """What a network was trained on, enough to find the same images again and to check them.

    Attributes:
        name: as given to `--dataset`.
        classes: label names by index.
        mean, std: per channel, of the training part, in pixel units 0..255.
        preprocessing: from an image file to the network's uint8 input.
        split_seed: seed of the split.
        sizes: images in `train`, `validation`, `test`.
        sha256: over pixels and labels of the three parts in that order.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preprocessing: Preprocessing
    split_seed: int
    sizes: Mapping[str, int]
    sha256: str

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape `[C, H, W]` of one image."""
        return self.preprocessing.shape

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "classes": list(self.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "preprocessing": self.preprocessing.to_dict(),
            "sizes": dict(self.sizes),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DataIdentity:
        return cls(
            **{
                **fields,
                "classes": tuple(fields["classes"]),
                "mean": tuple(fields["mean"]),
                "std": tuple(fields["std"]),
                "preprocessing": Preprocessing.from_dict(fields["preprocessing"]),
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """A data set, split: `validation` is held out of the training data; `test` is for the end."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    identity: DataIdentity


def load(name: str, root: Path | None = None) -> Data:
    """Load a data set by the name that `--dataset` takes.

    Raises:
        ConfigError: no such data set.
        DataError: the files are missing, damaged or unusable.
    """
    if name not in DATASETS:
        raise ConfigError(f"--dataset {name}: unknown; the data sets are: {', '.join(DATASETS)}")
    return DATASETS[name](root)


def load_again(identity: DataIdentity, root: Path | None = None) -> Data:
    """Load the data that a checkpoint was trained on and check that it is the same, image by image.

    Raises DataError when it is not.
    """
    data = load(identity.name, root)
    if data.identity.sha256 != identity.sha256:
        raise DataError(
            f"data set {identity.name}: not the images that the checkpoint was trained on"
            f" (sha256 {data.identity.sha256[:12]}, recorded {identity.sha256[:12]});"
            " point --data-root at the original data"
        )
    return data


def _digits(root: Path | None) -> Data:
    """scikit-learn's digits: 1797 real 8x8 grey scans, in the package itself (UCI, 1998)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "data set digits: scikit-learn is not installed; pip install 'eps-resnet[train]'"
        ) from None
    source = load_digits()
    pixels = torch.from_numpy(source.images)  # 0..16
    images = (pixels * (255 / 16)).round().to(torch.uint8)[:, None]
    return split(
        ImageSet(images, torch.from_numpy(source.target).to(torch.int64)),
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        preprocessing=Preprocessing(resize=(8, 8), crop=(8, 8), color="grey"),
    )


def split(
    whole: ImageSet, *, name: str, classes: tuple[str, ...], preprocessing: Preprocessing
) -> Data:
    """Split by class: a fifth for the test part, a tenth of the rest for validation.

    Raises DataError when a class has too few images for all three parts.
    """
    counts = whole.labels.bincount(minlength=len(classes))
    if len(classes) < 2:
        raise DataError(f"data set {name}: only one class; a classifier needs two or more")
    for label, count in zip(classes, counts.tolist(), strict=True):
        if count < 3:
            raise DataError(
                f"data set {name}: class {label} has {count} images; at least 3 are needed"
                " for training, validation and test"
            )
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    parts: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for index in range(len(classes)):
        members = whole.labels.eq(index).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        test = max(1, round(len(members) / 5))
        validation = max(1, round((len(members) - test) / 10))
        for part, piece in zip(
            ("test", "validation", "train"),
            members.split([test, validation, len(members) - test - validation]),
            strict=True,
        ):
            parts[part].append(piece)
    # Index order, so that every part mixes the classes as the source did.
    sets = {part: whole[torch.cat(pieces).sort().values] for part, pieces in parts.items()}
    pixels = sets["train"].images.to(torch.float64)
    return Data(
        **sets,
        identity=DataIdentity(
            name=name,
            classes=classes,
            mean=tuple(pixels.mean(dim=(0, 2, 3)).tolist()),
            std=tuple(pixels.std(dim=(0, 2, 3)).clamp_min(1.0).tolist()),
            preprocessing=preprocessing,
            split_seed=SPLIT_SEED,
            sizes={part: len(images) for part, images in sets.items()},
            sha256=_sha256(sets.values()),
        ),
    )


def _sha256(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(tuple(part.images.shape)).encode())
        digest.update(part.images.numpy().tobytes())
        digest.update(part.labels.numpy().tobytes())
    return digest.hexdigest()


DATASETS: dict[str, Callable[[Path | None], Data]] = {"digits": _digits}
