"""Image data sets, split once and for good into training, validation and test parts.

A set consists of raw uint8 pixels, in memory or on disk; what turns pixels into network input
(`Preprocessing`, mean, std) is recorded in its :class:`DataIdentity` and travels with the
checkpoint.
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
from eps_train.images import Part, Source
from eps_train.normalization import Mean, frozen, kind_of, measure, thawed
from eps_train.preprocess import Preprocessing

SPLIT_SEED = 0  # one split for all runs: seeds are compared on the same images
TEST_SHARE = 5  # a fifth of the images, where the source has no test part of its own
VALIDATION_SHARE = 10  # a tenth of the rest, but
VALIDATION_MOST = 10_000  # no more than these in all: they tell accuracies half a point apart

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
    "svhn": Outline((3, 32, 32), 10, 594_388),
    "imagenet": Outline((3, 224, 224), 1_000, 1_271_167),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataIdentity:
    """What a network was trained on, enough to find the same images again and to check them.

    Attributes:
        name: as given to `--dataset`.
        classes: label names by index.
        mean: of the training part, in pixel units 0..255: per channel, or the mean image
            `[C][H][W]`.
        std: per channel, in the same units; with a mean image 128.
        preprocessing: from an image file to the network's uint8 input.
        split_seed: seed of the split.
        sizes: images in `train`, `validation`, `test`.
        sha256: over pixels and labels of the three parts in that order; of a set that is not held
            in memory over relative file names, file sizes and labels.
    """

    name: str
    classes: tuple[str, ...]
    mean: Mean
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
    def normalization(self) -> str:
        """`channel` or `pixel`, as `load` takes it."""
        return kind_of(self.mean)

    @property
    def outline(self) -> Outline:
        return Outline(self.input_shape, len(self.classes), self.sizes["train"])

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "classes": list(self.classes),
            "mean": thawed(self.mean),
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
                "mean": frozen(fields["mean"]),
                "std": tuple(fields["std"]),
                "preprocessing": Preprocessing.from_dict(fields["preprocessing"]),
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """A data set, split: `validation` is held out of the training data; `test` is for the end."""

    train: Part
    validation: Part
    test: Part
    identity: DataIdentity


def load(
    name: str,
    root: Path | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    normalization: str = "channel",
    download: bool = False,
) -> Data:
    """Load a data set and split it.

    Args:
        name: as `--dataset` takes it: one of `DATASETS`, or ``folder:PATH``.
        root: folder with the set's files, the current folder if None; for ``folder:PATH`` it takes
            the place of PATH (on a machine where the images lie elsewhere).
        image_size: height and width to bring the images to; None: as they are.
        normalization: `channel` or `pixel`, as `normalization.measure` takes it.
        download: let torchvision fetch the files that are missing, of the sets it can fetch.

    Raises:
        ConfigError: no such data set, or options that it does not have.
        DataError: the files are missing, damaged or unusable.
    """
    source = _read(name, root, image_size, download)
    return split(source, name=name, normalization=normalization)


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
    data = load(
        identity.name,
        root,
        image_size=identity.preprocessing.crop,
        normalization=identity.normalization,
    )
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
    if name == "imagenet":
        from eps_train.readers import imagenet

        return imagenet.read(root or Path(), image_size)
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

        return idx.read(name, root, download=download)
    from eps_train.readers import archives

    return archives.read(name, root, download=download)


def split(source: Source, *, name: str, normalization: str = "channel") -> Data:
    """Split off, class by class, the parts that the source does not have.

    A fifth becomes the test part; a tenth of the rest, but not above 10,000 images in all, the
    validation part; seeded, and the same for every run. Raises DataError when a class has too few
    images for all three parts.
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
        most = max(1, VALIDATION_MOST // len(classes))
        validation = min(most, max(1, round(rest / VALIDATION_SHARE)))
        validation = 0 if source.validation else validation
        train = rest - validation
        if train < 1:
            raise DataError(
                f"data set {name}: class {label} has {_count(len(members))}; at least"
                f" {1 + bool(test) + bool(validation)} are needed to split them"
            )
        pieces = members.split([test, validation, train])
        for part, piece in zip(("test", "validation", "train"), pieces, strict=True):
            indices[part].append(piece)
    # Index order, so that every part mixes the classes as the source did.
    parts = {part: source.train[torch.cat(found).sort().values] for part, found in indices.items()}
    sets: dict[str, Part] = {
        "train": parts["train"],
        "validation": source.validation or parts["validation"],
        "test": source.test or parts["test"],
    }
    mean, std = measure(sets["train"], normalization)
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


def _count(images: int) -> str:
    return "1 image" if images == 1 else f"{images:,} images"


def _sha256(parts: Iterable[Part]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        part.update(digest)
    return digest.hexdigest()
