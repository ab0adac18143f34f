"""Image data sets, split once and for good into training, validation and test parts.

Every set is held as raw uint8 pixels; what turns pixels into network input (`Preprocessing`, mean,
std) is recorded in its :class:`DataIdentity` and travels with the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eps_train.errors import ConfigError, DataError
from eps_train.images import ImageSet, Source
from eps_train.preprocess import Preprocessing

SPLIT_SEED = 0  # one split for all runs: seeds are compared on the same images
TEST_SHARE = 5  # a fifth of the images, where the source has no test part of its own
VALIDATION_SHARE = 10  # a tenth of the rest

FOLDER = "folder:"


@dataclass(frozen=True, slots=True)
class Outline:
    """What a network and a schedule need to know of a data set.

    Shape `[C, H, W]` of an image, number of classes, and (about) how many images to train on.
    """

    shape: tuple[int, int, int]
    classes: int
    train: int


DATASETS = {
    "digits": Outline((1, 8, 8), 10, 1_295),
    "mnist": Outline((1, 28, 28), 10, 54_001),
    "fashion-mnist": Outline((1, 28, 28), 10, 54_000),
    "cifar10": Outline((3, 32, 32), 10, 45_000),
    "cifar100": Outline((3, 32, 32), 100, 45_000),
    "svhn": Outline((3, 32, 32), 10, 543_949),
}


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

    @property
    def outline(self) -> Outline:
        return Outline(self.input_shape, len(self.classes), self.sizes["train"])

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


def load(
    name: str,
    root: Path | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    download: bool = False,
) -> Data:
    """Load a data set and split it.

    Args:
        name: as `--dataset` takes it: one of `DATASETS`, or ``folder:PATH``.
        root: folder with the set's files, the current folder if None; for ``folder:PATH`` it takes
            the place of PATH (on a machine where the images lie elsewhere).
        image_size: height and width to bring the images to; None: as they are.
        download: let torchvision fetch the files that are missing (CIFAR and SVHN).

    Raises:
        ConfigError: no such data set, or options that it does not have.
        DataError: the files are missing, damaged or unusable.
    """
    return split(_read(name, root, image_size, download), name=name)


def outline(
    name: str, root: Path | None = None, image_size: tuple[int, int] | None = None
) -> Outline:
    """Outline of a data set, without reading it unless it is a folder. Raises as `load` does."""
    if name in DATASETS:
        known = DATASETS[name]
        return replace(known, shape=(known.shape[0], *image_size)) if image_size else known
    return load(name, root, image_size=image_size).identity.outline


def load_again(identity: DataIdentity, root: Path | None = None) -> Data:
    """Load the data that a checkpoint was trained on and check that it is the same, image by image.

    Raises DataError when it is not.
    """
    data = load(identity.name, root, image_size=identity.preprocessing.crop)
    if data.identity.sha256 != identity.sha256:
        raise DataError(
            f"data set {identity.name}: not the images that the checkpoint was trained on"
            f" (sha256 {data.identity.sha256[:12]}, recorded {identity.sha256[:12]});"
            " point --data-root at the original data"
        )
    return data


def _read(
    name: str, root: Path | None, image_size: tuple[int, int] | None, download: bool
) -> Source:
    # Imported here: a run needs one reader, and some readers are slow to import.
    if name.startswith(FOLDER):
        from eps_train.readers import folder

        return folder.read(root or Path(name.removeprefix(FOLDER)), image_size)
    if name not in DATASETS:
        raise ConfigError(
            f"--dataset {name}: unknown; the data sets are: {', '.join(DATASETS)}, folder:PATH"
        )
    source = _read_known(name, root or Path(), download)
    if image_size in (None, source.preprocessing.crop):
        return source
    return source.resized(image_size)


def _read_known(name: str, root: Path, download: bool) -> Source:
    if name == "digits":
        from eps_train.readers import digits

        return digits.read()
    if name in ("mnist", "fashion-mnist"):
        from eps_train.readers import idx

        return idx.read(name, root)
    from eps_train.readers import archives

    return archives.read(name, root, download=download)


def split(source: Source, *, name: str) -> Data:
    """Split off, class by class, the parts that the source does not have.

    A fifth becomes the test part, a tenth of the rest the validation part; seeded, and the same for
    every run. Raises DataError when a class has too few images for all three parts.
    """
    classes = source.classes
    if len(classes) < 2:
        raise DataError(f"data set {name}: only one class; a classifier needs two or more")
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    indices: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for index, label in enumerate(classes):
        members = source.train.labels.eq(index).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        test = 0 if source.test else max(1, round(len(members) / TEST_SHARE))
        rest = len(members) - test
        validation = 0 if source.validation else max(1, round(rest / VALIDATION_SHARE))
        train = rest - validation
        if train < 1:
            raise DataError(
                f"data set {name}: class {label} has {len(members)} images; at least"
                f" {1 + bool(test) + bool(validation)} are needed to split them"
            )
        pieces = members.split([test, validation, train])
        for part, piece in zip(("test", "validation", "train"), pieces, strict=True):
            indices[part].append(piece)
    # Index order, so that every part mixes the classes as the source did.
    parts = {part: source.train[torch.cat(found).sort().values] for part, found in indices.items()}
    sets = {
        "train": parts["train"],
        "validation": source.validation or parts["validation"],
        "test": source.test or parts["test"],
    }
    mean, std = _statistics(sets["train"].images)
    return Data(
        **sets,
        identity=DataIdentity(
            name=name,
            classes=classes,
            mean=mean,
            std=std,
            preprocessing=source.preprocessing,
            split_seed=SPLIT_SEED,
            sizes={part: len(images) for part, images in sets.items()},
            sha256=_sha256(sets.values()),
        ),
    )


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel of uint8 `[N, C, H, W]`, in pixel units."""
    values = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in images.unbind(dim=1):
        # From the histogram: exact, and no float copy of the whole set.
        counts = channel.flatten().bincount(minlength=256).to(torch.float64)
        mean = (counts * values).sum() / counts.sum()
        variance = (counts * (values - mean) ** 2).sum() / (counts.sum() - 1).clamp_min(1)
        means.append(mean.item())
        deviations.append(max(variance.sqrt().item(), 1.0))
    return tuple(means), tuple(deviations)


def _sha256(parts: Iterable[ImageSet]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(tuple(part.images.shape)).encode())
        digest.update(part.images.contiguous().numpy().data)
        digest.update(part.labels.contiguous().numpy().data)
    return digest.hexdigest()
