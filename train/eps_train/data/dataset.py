"""Image data sets, split once and for good into training, validation and test parts.

A set consists of raw uint8 pixels, in memory or on disk; what turns pixels into network input
(`Preprocessing`, mean, std) is recorded in its :class:`DataIdentity` and travels with the
checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eps_core.errors import ConfigError, DamagedImages, DataError
from eps_core.preprocessing import Preprocessing
from eps_train.data import images
from eps_train.data.images import FileSet, Findings, ImageSet, Part, Source

# -- Mean and deviation that a network's input is normalised with, found in the training part

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


SPLIT_SEED = 0  # one split for all runs: seeds are compared on the same images
TEST_SHARE = 5  # a fifth of the images, where the source has no test part of its own
VALIDATION_SHARE = 10  # a tenth of the rest, but
VALIDATION_MOST = 10_000  # no more than these in all: they tell accuracies half a point apart

FOLDER = "folder:"

_NAMED = 10  # classes that are named before training
_NAMED_PROBLEMS = 3  # damaged images that an error names
_DIM_BITS = 13  # of 16, used by all images together, up to which they are next to black


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
        digests: the same over `train` alone, and over `train` and `validation`: by them a change of
            the test part is told from a change of what a network is trained on.
        held: whether the images were held in memory; None in files that do not say it yet.
        skipped: damaged images that were there and are not used, below the set's folder.
    """

    name: str
    classes: tuple[str, ...]
    mean: Mean
    std: tuple[float, ...]
    preprocessing: Preprocessing
    split_seed: int
    sizes: Mapping[str, int]
    sha256: str
    digests: Mapping[str, str] = field(default_factory=dict)
    held: bool | None = None
    skipped: tuple[str, ...] = ()

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
            "digests": dict(self.digests),
            "skipped": list(self.skipped),
        }

    def may_be(self, name: str) -> bool:
        """Whether `--dataset name` may mean this set: that, or one more way to write a folder."""
        return self.name == name or (self.name.startswith(FOLDER) and name.startswith(FOLDER))

    def changed_part(self, other: DataIdentity) -> str | None:
        """The first part in which `other` differs, `test` only if both sides say so; else `data`.

        None when they are the same images.
        """
        if self.sha256 == other.sha256:
            return None
        for part in ("train", "validation"):
            if not (self.digests.get(part) and other.digests.get(part)):
                return "data"
            if self.digests[part] != other.digests[part]:
                return part
        return "test"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DataIdentity:
        return cls(
            **{
                **fields,
                "classes": tuple(fields["classes"]),
                "mean": frozen(fields["mean"]),
                "std": tuple(fields["std"]),
                "preprocessing": Preprocessing.from_dict(fields["preprocessing"]),
                "skipped": tuple(fields.get("skipped", ())),
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """A data set, split: `validation` is held out of the training data; `test` is for the end.

    `left_out` says in words what lies beside the images and is not used, `warning` what is odd
    about them; both are empty as a rule.
    """

    train: Part
    validation: Part
    test: Part
    identity: DataIdentity
    left_out: str = ""
    warning: str = ""

    def describe(self) -> str:
        """One line: the classes, how many images each has and each part has, what is left out."""
        identity, parts = self.identity, (self.train, self.validation, self.test)
        labels = torch.cat([part.labels.cpu() for part in parts])
        counts = labels.bincount(minlength=len(identity.classes)).tolist()
        classes = [
            f"{' '.join(label.split())} ({count:,})"
            for label, count in zip(identity.classes, counts, strict=True)
        ]
        if len(classes) > _NAMED:
            classes[_NAMED:] = [f"and {len(classes) - _NAMED:,} more"]
        skipped = len(identity.skipped)
        left_out = [self.left_out, f"{_count(skipped)} that cannot be read" if skipped else ""]
        sizes = ", ".join(f"{part} {count:,}" for part, count in identity.sizes.items())
        return (
            f"data set {identity.name}: {len(identity.classes):,} classes: {', '.join(classes)};"
            f" {sizes}" + "".join(f"; left out: {what}" for what in left_out if what)
        )


def load(
    name: str,
    root: Path | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    normalization: str = "channel",
    download: bool = False,
    like: DataIdentity | None = None,
    room: int | None = None,
    check: bool = False,
    skip_damaged: bool = False,
) -> Data:
    """Load a data set and split it.

    Args:
        name: as `--dataset` takes it: one of `DATASETS`, or ``folder:PATH``.
        root: folder with the set's files, the current folder if None; for ``folder:PATH`` it takes
            the place of PATH (on a machine where the images lie elsewhere).
        image_size: height and width to bring the images to; None: as they are.
        normalization: `channel` or `pixel`, as `normalization.measure` takes it.
        download: let torchvision fetch the files that are missing, of the sets it can fetch.
        like: the set as it was loaded before; images of files are read and held as they were then.
        room: bytes of pixels that this process may hold; None: :func:`room_for_images`.
        check: decode every image once, also of a set that stays on disk.
        skip_damaged: leave out the images that cannot be decoded.

    Raises:
        ConfigError: no such data set, or options that it does not have.
        DamagedImages: some images cannot be decoded; all of them are named.
        DataError: the files are missing, damaged or unusable.
    """
    if room is None:
        room = room_for_images()
    source = _read(name, root, image_size, download, room, like)
    if like is not None and source.folder is not None:
        held = like.held
        if held is None:
            shape = math.prod(like.input_shape)
            held = name != "imagenet" and sum(like.sizes.values()) * shape <= images.MEMORY
        source = replace(_without(source, like.skipped), held=held)
    return split(
        source, name=name, normalization=normalization, check=check, skip_damaged=skip_damaged
    )


def room_for_images() -> int:
    """Bytes of pixels that this process may hold: its share of half the memory that is free."""
    return images.available() // 2 // images.local_processes()


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
        like=identity,
    )
    part = identity.changed_part(data.identity)
    if part == "test":
        raise DataError(
            f"data set {identity.name}: its test images are not those that the checkpoint was"
            " tested on (the training and validation images are the same); put those back, or"
            " point --data-root at the original data"
        )
    if part is not None:
        which = "" if part == "data" else f", beginning with its {part} part"
        raise DataError(
            f"data set {identity.name}: not the images that the checkpoint was trained on{which}"
            f" (sha256 {data.identity.sha256[:12]}, recorded {identity.sha256[:12]});"
            " point --data-root at the original data"
        )
    return data


def _read(
    name: str,
    root: Path | None,
    image_size: tuple[int, int] | None,
    download: bool,
    room: int,
    like: DataIdentity | None,
) -> Source:
    # Imported here: a run needs one reader, and some readers are slow to import.
    if name.startswith(FOLDER):
        from eps_train.data import folder

        path = name.removeprefix(FOLDER)
        if root is None and not path:
            raise ConfigError(
                f"--dataset {FOLDER}: names no folder; write {FOLDER}PATH ({FOLDER}. for this one)"
            )
        known = like.preprocessing if like is not None else None
        return folder.read_folder(
            root or Path(path).expanduser(), image_size, room=room, known=known
        )
    if name not in DATASETS:
        raise ConfigError(
            f"--dataset {name}: unknown; the data sets are: {', '.join(DATASETS)}, folder:PATH"
        )
    if name == "imagenet":
        from eps_train.data import folder

        return folder.read_imagenet(root or Path(), image_size)
    source = _read_known(name, root or Path(), download)
    if image_size in (None, source.preprocessing.crop):
        return source
    return source.resized(image_size)


def _read_known(name: str, root: Path, download: bool) -> Source:
    if name == "digits":
        from eps_train.data import downloads

        return downloads.read_digits()
    if name in ("mnist", "fashion-mnist"):
        from eps_train.data import downloads

        return downloads.read_idx(name, root, download=download)
    from eps_train.data import downloads

    return downloads.read_archive(name, root, download=download)


def split(
    source: Source,
    *,
    name: str,
    normalization: str = "channel",
    check: bool = False,
    skip_damaged: bool = False,
) -> Data:
    """Split off, class by class, the parts that the source does not have, and read what is held.

    A fifth becomes the test part; a tenth of the rest, but not above 10,000 images in all, the
    validation part; seeded, and the same for every run. `check` and `skip_damaged` are those of
    :func:`load`. Raises DataError when a class has too few images for all three parts, and
    DamagedImages.
    """
    sets = _split(source, name)
    found = Findings()
    for part, images_of_part in sets.items():
        if isinstance(images_of_part, FileSet) and source.held:
            sets[part], seen = images_of_part.hold()
        elif isinstance(images_of_part, FileSet) and check:
            seen = images_of_part.check()
        else:
            continue
        found.add(seen)
    if found.problems and not skip_damaged:
        raise _damaged(name, found.problems, sum(map(len, sets.values())))
    if found.problems:
        assert source.folder is not None
        bad = [os.path.relpath(path, source.folder) for path in sorted(found.problems)]
        # Split again without them: as if they had not been there.
        return split(_without(source, bad), name=name, normalization=normalization, check=check)
    try:
        mean, std = measure(sets["train"], normalization)
    except DataError as error:
        raise DataError(f"data set {name}: {error}") from None
    digests = _digests(sets)
    return Data(
        **sets,
        identity=DataIdentity(
            name=name,
            classes=source.classes,
            mean=mean,
            std=std,
            preprocessing=source.preprocessing,
            split_seed=SPLIT_SEED,
            sizes={part: len(images) for part, images in sets.items()},
            sha256=digests.pop("test"),
            digests=digests,
            held=not isinstance(sets["train"], FileSet),
            skipped=source.skipped,
        ),
        left_out=source.left_out,
        warning=_dim(name, found),
    )


def _split(source: Source, name: str) -> dict[str, Part]:
    """The parts `train`, `validation` and `test`."""
    classes = source.classes
    if len(classes) < 2:
        raise DataError(
            f"data set {name}: only one class, {', '.join(classes)}; a classifier needs two or more"
        )
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
    return {
        "train": parts["train"],
        "validation": source.validation or parts["validation"],
        "test": source.test or parts["test"],
    }


def _without(source: Source, names: Sequence[str]) -> Source:
    """`source` without the files of these names below its folder."""
    if not names:
        return source
    assert source.folder is not None
    paths = {os.path.join(source.folder, name) for name in names}

    def rest(part: Part | None) -> Part | None:
        return part.without(paths) if isinstance(part, FileSet) else part

    train = rest(source.train)
    assert train is not None
    return replace(
        source,
        train=train,
        validation=rest(source.validation),
        test=rest(source.test),
        skipped=(*source.skipped, *names),
    )


def _damaged(name: str, problems: Mapping[str, str], total: int) -> DamagedImages:
    first = "; ".join(list(problems.values())[:_NAMED_PROBLEMS])
    more = len(problems) - _NAMED_PROBLEMS
    return DamagedImages(
        f"data set {name}: {len(problems):,} of {total:,} images cannot be read: {first}"
        + (f"; and {more:,} more" if more > 0 else "")
        + "; repair them or take them away, or train without them (eps-train --skip-damaged)",
        problems,
    )


def _dim(name: str, found: Findings) -> str:
    """A warning of 16-bit images of which the upper 8 bits are next to black."""
    bits = found.peak.bit_length()
    if not found.deep or bits > _DIM_BITS:
        return ""
    return (
        f"data set {name}: the values of its 16-bit images ({found.deep:,}) use {bits} bits only:"
        f" the largest is {found.peak:,} of 65,535, so that all of them are read nearly black;"
        f" multiply them by {2 ** (16 - bits)}"
    )


def _count(images: int) -> str:
    return "1 image" if images == 1 else f"{images:,} images"


def _digests(parts: Mapping[str, Part]) -> dict[str, str]:
    """SHA-256 up to and with each part."""
    digest, found = hashlib.sha256(), {}
    for name, part in parts.items():
        part.update(digest)
        found[name] = digest.hexdigest()
    return found
