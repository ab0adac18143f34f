"""Image data sets, split into training, validation and test parts, the same way for every run.

A part consists of raw uint8 pixels, in memory or on disk; what turns pixels into network input
(`Preprocessing`, mean, std) is recorded in its :class:`DataIdentity` and saved in the checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from eps_core import machine
from eps_core.errors import ConfigError, DamagedImages, DataError
from eps_core.preprocessing import Preprocessing
from eps_train.config import from_plain_data, plain_data
from eps_train.data import downloads, folder, images
from eps_train.data.folder import ReadOptions
from eps_train.data.images import FileSet, ImageSet, Part, RawDataset, ScanStatistics

# -- Mean and std of the training part, by which a network's input is normalized

Mean = tuple[float | tuple[tuple[float, ...], ...], ...]
"""Per channel `[C]`, or a mean image `[C][H][W]`, as plain data that every file can hold."""

Statistics = tuple[Mean, tuple[float, ...]]
"""Mean and std, in pixel units 0..255."""

PIXEL_SCALE = 128.0  # what the paper divides small images by
_SAMPLE = 1_000  # images that represent a part on disk
_BATCH = 100
_SEED = 0


def measure(train: Part, kind: str) -> Statistics:
    """Mean and std of a training part; of one on disk, always of the same 1,000 images.

    `kind` is `channel` for mean and std of every channel, or `pixel` for the mean image, and 128
    for every channel, as in the paper (CIFAR and SVHN).

    Raises:
        ConfigError: `pixel`, for a part that is not in memory.
        DataError: an image cannot be read, or all images are of one color.
    """
    if kind == "pixel":
        if not isinstance(train, ImageSet):
            raise ConfigError(
                "--normalization pixel: needs a set that fits in memory; use channel with this one"
            )
        pixels = train.images
        lowest, highest = pixels.amin(dim=(0, 2, 3)), pixels.amax(dim=(0, 2, 3))
        _refuse_one_color(lowest.ne(highest).tolist(), lowest.tolist())
        # A sum of integers: exact but for the one rounding of the division.
        image = pixels.sum(dim=0, dtype=torch.int64).to(torch.float64) / len(train)
        mean: Mean = msgspec.convert(image.tolist(), Mean)
        return mean, (PIXEL_SCALE,) * len(mean)
    if isinstance(train, ImageSet):
        return _channels(train.batches(_BATCH))
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(_SEED))[:_SAMPLE]
    return _channels(train[chosen.sort().values].batches(_BATCH))


def summary(mean: Mean, std: tuple[float, ...]) -> dict[str, Any]:
    """Kind, mean and std per channel as plain data for reports.

    Of a mean image it is its mean: the thousands of numbers themselves are in the network.
    """
    if isinstance(mean[0], tuple):
        image = torch.tensor(mean, dtype=torch.float64)
        return {"kind": "pixel", "mean": image.mean(dim=(1, 2)).tolist(), "std": list(std)}
    return {"kind": "channel", "mean": list(mean), "std": list(std)}


def fitting(statistics: Statistics, shape: tuple[int, int, int]) -> Statistics:
    """`statistics` of other images for images of `shape` `[C, H, W]`.

    A mean image of another size becomes its mean per channel, and those of RGB images the mean of
    the three channels for grayscale images. Raises ConfigError for other channels.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in statistics)
    if mean.shape == shape:
        return statistics
    if mean.dim() == 3:
        mean = mean.mean(dim=(1, 2))
    if shape[0] == 1:
        mean, std = mean.mean()[None], std.mean()[None]
    if len(mean) != shape[0]:
        raise ConfigError(
            f"--normalization pretrained: the weights are for images of {len(mean)} channels, the"
            f" data has {shape[0]}; use channel"
        )
    return tuple(mean.tolist()), tuple(std.tolist())


def _channels(parts: Iterable[ImageSet]) -> Statistics:
    """Mean and std of every channel, over all images together."""
    # From the histograms `[C, 256]`: exact, and no float copy of the whole set.
    histograms = sum(
        torch.stack([c.flatten().bincount(minlength=256) for c in part.images.unbind(dim=1)])
        for part in parts
    )
    assert isinstance(histograms, Tensor)
    _refuse_one_color(histograms.gt(0).sum(dim=1).gt(1).tolist(), histograms.argmax(dim=1).tolist())
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for counts in histograms.to(torch.float64):
        mean = (counts * values).sum() / counts.sum()
        variance = (counts * (values - mean) ** 2).sum() / (counts.sum() - 1).clamp_min(1)
        means.append(mean.item())
        stds.append(max(variance.sqrt().item(), 1.0))
    return tuple(means), tuple(stds)


def _refuse_one_color(varies: Sequence[bool], color: Sequence[int]) -> None:
    """Raise DataError unless one of the channels varies."""
    if not any(varies):
        value = ", ".join(map(str, color))
        raise DataError(
            f"its training images are all one color (every pixel is {value} of 255), so that there"
            " is nothing to learn from; check the files"
        )


# -- Data sets and their identity

SPLIT_SEED = 0  # one split for all runs: seeds are compared on the same images
TEST_SHARE = 5  # a fifth of the images, where the data set has no test part of its own
VALIDATION_SHARE = 10  # a tenth of the rest, but
VALIDATION_MOST = 10_000  # no more than these in all: they tell accuracies half a point apart

_ELSEWHERE = ("folder:", "csv:", "hf:")  # names with a path, which differs from machine to machine

_NAMED = 10  # classes that are named before training
_NAMED_PROBLEMS = 3  # damaged images that an error names
_DARK_BITS = 13  # of 16: images that use no more are nearly black
_MEMORY = 8 << 30  # bytes of pixels in memory, at most, in runs that did not record `held`


@dataclass(frozen=True, slots=True)
class Outline:
    """Shape `[C, H, W]` of a data set's images, its classes, and about its training images."""

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
    """What a network was trained on: enough to find the same images again and to verify them.

    Attributes:
        name: as given to `--dataset`.
        classes: label names by index.
        mean, std: of the training part, in pixel units 0..255. The mean is per channel, or an image
            `[C][H][W]`; std is per channel, with a mean image 128.
        preprocessing: from an image file to the network's uint8 input.
        sizes: number of images in `train`, `validation`, `test`.
        sha256: over pixels and labels of the three parts in that order; of a set on disk over
            relative file names, file sizes and labels.
        digests: the same over `train` alone, and over `train` and `validation`; they tell a change
            of the test part from a change of what a network is trained on.
        held: whether the images were in memory; None in older files, which do not record it.
        skipped: damaged images that are not used, relative to the set's folder.
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
        return self.preprocessing.shape

    @property
    def normalization(self) -> str:
        """`channel` or `pixel`, as :func:`load` takes it."""
        return "pixel" if isinstance(self.mean[0], tuple) else "channel"

    @property
    def outline(self) -> Outline:
        return Outline(self.input_shape, len(self.classes), self.sizes["train"])

    def may_be(self, name: str) -> bool:
        """Whether `--dataset name` may mean this set: its name, or another path of its kind."""
        return self.name == name or any(
            self.name.startswith(kind) and name.startswith(kind) for kind in _ELSEWHERE
        )

    def changed_part(self, other: DataIdentity) -> str | None:
        """The first part in which `other` differs, `data` where one of the two does not record it.

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

    def to_dict(self) -> dict[str, Any]:
        return plain_data(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DataIdentity:
        """Inverse of :meth:`to_dict`. Raises ConfigError for bad fields."""
        return from_plain_data(fields, cls)


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """A data set, split: `validation` is held out of the training data; `test` is for the end.

    `left_out` describes files beside the images, `warning` what is odd about the images.
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


# -- Loading


def load(
    name: str,
    root: Path | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    fit: str = "crop",
    normalization: str = "channel",
    statistics: Statistics | None = None,
    download: bool = False,
    like: DataIdentity | None = None,
    room: int | None = None,
    check: bool = False,
    skip_damaged: bool = False,
) -> Data:
    """Load a data set and split it.

    Args:
        name: as `--dataset` takes it: one of `DATASETS`, ``folder:PATH``, ``csv:PATH`` or
            ``hf:PATH``.
        root: folder of the set's files, the current folder if None. It replaces PATH of
            ``folder:PATH`` and ``hf:PATH``, and the folder of PATH of ``csv:PATH`` (on a machine
            where the images are elsewhere).
        image_size: height and width to resize the images to; None: as they are.
        fit: `crop` or `letterbox`, as in :class:`~eps_core.preprocessing.Preprocessing`.
        normalization: `channel` or `pixel`, as :func:`measure` takes it.
        statistics: mean and std to normalize by instead, for images of any size.
        download: download missing files, of the sets that torchvision can download.
        like: the set as it was loaded before; image files are read and kept as they were then, and
            mean and std are the same.
        room: bytes of pixels that this process may hold; None: :func:`room_for_images`.
        check: decode every image once, also of a set that stays on disk.
        skip_damaged: leave out the images that cannot be decoded.

    Raises:
        ConfigError: no such data set, or options that it does not have.
        DamagedImages: some images cannot be decoded; all of them are named.
        DataError: the files are missing, damaged or unusable.
    """
    room = room_for_images() if room is None else room
    known = None if like is None else like.preprocessing
    options = ReadOptions(size=image_size, fit=fit, room=room, known=known)
    raw = _read(name, root, options, download=download)
    if like is not None and raw.folder is not None:
        held = like.held
        if held is None:
            size = sum(like.sizes.values()) * math.prod(like.input_shape)
            held = name != "imagenet" and size <= _MEMORY
        raw = replace(_without(raw, like.skipped), held=held)
    if like is not None and like.input_shape == raw.preprocessing.shape:
        statistics = (like.mean, like.std)
    return split(
        raw,
        name=name,
        normalization=normalization,
        statistics=statistics,
        check=check,
        skip_damaged=skip_damaged,
    )


def room_for_images() -> int:
    """Bytes of pixels that this process may hold: its share of half the memory that is free."""
    return machine.available_memory() // 2 // images.local_processes()


def outline(name: str, image_size: tuple[int, int] | None = None) -> Outline:
    """Outline of one of `DATASETS`, without reading it."""
    known = DATASETS[name]
    return replace(known, shape=(known.shape[0], *image_size)) if image_size else known


def load_again(identity: DataIdentity, root: Path | None = None) -> Data:
    """Load the data that a checkpoint was trained on. Raises DataError when it has changed."""
    if not identity.name:
        raise DataError(
            "the checkpoint names no data set; name one with BlockPruner.save(..., data=)"
        )
    data = load(
        identity.name,
        root,
        image_size=identity.preprocessing.crop,
        fit=identity.preprocessing.fit,
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


def _read(name: str, root: Path | None, options: ReadOptions, *, download: bool) -> RawDataset:
    given = name.partition(":")[2]
    path = Path(given).expanduser()
    if name.startswith("folder:"):
        if root is None and not given:
            raise ConfigError(
                "--dataset folder:: names no folder; write folder:PATH (folder:. for this one)"
            )
        return folder.read_folder(root or path, options)
    if name.startswith("csv:"):
        if not path.name:
            raise ConfigError("--dataset csv:: names no file; write csv:PATH")
        return folder.read_csv(path if root is None else root / path.name, options)
    if name.startswith("hf:"):
        if root is None and not given:
            raise ConfigError("--dataset hf:: names no data set; write hf:PATH or hf:NAME")
        return folder.read_huggingface(given, root, options)
    if name not in DATASETS:
        raise ConfigError(
            f"--dataset {name}: unknown; the data sets are: {', '.join(DATASETS)}, folder:PATH,"
            " csv:PATH, hf:PATH"
        )
    root = root or Path()
    if name == "imagenet":
        return folder.read_imagenet(root, options.size, options.fit)
    if name == "digits":
        raw = downloads.read_digits()
    elif name in ("mnist", "fashion-mnist"):
        raw = downloads.read_idx(name, root, download=download)
    else:
        raw = downloads.read_archive(name, root, download=download)
    how = replace(raw.preprocessing, fit=options.fit)
    if options.size in (None, how.crop):  # `fit` is for the images of eps-predict and eps-serve
        return replace(raw, preprocessing=how)
    how = replace(how, resize=options.size, crop=options.size)
    return replace(raw.map_parts(lambda part: part.preprocessed(how)), preprocessing=how)


def split(
    raw: RawDataset,
    *,
    name: str,
    normalization: str = "channel",
    statistics: Statistics | None = None,
    check: bool = False,
    skip_damaged: bool = False,
) -> Data:
    """Split off, class by class, the parts that `raw` lacks, and read what is to be in memory.

    A fifth becomes the test part; a tenth of the rest, but at most 10,000 images in all, the
    validation part; seeded, and the same for every run. The other arguments are those of
    :func:`load`. Raises DataError when a class has too few images for all three parts, and
    DamagedImages.
    """
    parts, found = _scanned(raw, name, check=check)
    while found.problems:
        if not skip_damaged:
            first = "; ".join(list(found.problems.values())[:_NAMED_PROBLEMS])
            more = len(found.problems) - _NAMED_PROBLEMS
            raise DamagedImages(
                f"data set {name}: {len(found.problems):,} of {sum(map(len, parts.values())):,}"
                f" images cannot be read: {first}"
                + (f"; and {more:,} more" if more > 0 else "")
                + "; repair or remove them, or train without them (eps-train --skip-damaged)",
                found.problems,
            )
        assert raw.folder is not None
        # Split again without them: as if they had not been there.
        raw = _without(raw, [os.path.relpath(path, raw.folder) for path in sorted(found.problems)])
        parts, found = _scanned(raw, name, check=check)
    if statistics is not None:
        mean, std = fitting(statistics, raw.preprocessing.shape)
    else:
        try:
            mean, std = measure(parts["train"], normalization)
        except DataError as error:
            raise DataError(f"data set {name}: {error}") from None
    digest, digests = hashlib.sha256(), {}  # up to and with each part
    for part, contents in parts.items():
        contents.update(digest)
        digests[part] = digest.hexdigest()
    bits = found.peak.bit_length()
    warning = (
        f"data set {name}: the values of its 16-bit images ({found.deep:,}) use {bits} bits only"
        f" (the largest is {found.peak:,} of 65,535), so that all of them are read nearly black;"
        f" multiply them by {2 ** (16 - bits)}"
    )
    return Data(
        **parts,
        identity=DataIdentity(
            name=name,
            classes=raw.classes,
            mean=mean,
            std=std,
            preprocessing=raw.preprocessing,
            split_seed=SPLIT_SEED,
            sizes={part: len(contents) for part, contents in parts.items()},
            sha256=digests.pop("test"),
            digests=digests,
            held=not isinstance(parts["train"], FileSet),
            skipped=raw.skipped,
        ),
        left_out=raw.left_out,
        warning=warning if found.deep and bits <= _DARK_BITS else "",
    )


def _scanned(raw: RawDataset, name: str, *, check: bool) -> tuple[dict[str, Part], ScanStatistics]:
    """The parts, in memory where `raw.held`, and what decoding their files showed."""
    parts, found = _split(raw, name), ScanStatistics()
    for part, files in parts.items():
        if isinstance(files, FileSet) and (raw.held or check):
            parts[part], seen = files.scan(keep=raw.held)
            found.add(seen)
    return parts, found


def _split(raw: RawDataset, name: str) -> dict[str, Part]:
    """The parts `train`, `validation` and `test`."""
    classes = raw.classes
    if len(classes) < 2:
        raise DataError(
            f"data set {name}: only one class, {', '.join(classes)}; a classifier needs two or more"
        )
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    indices: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for index, label in enumerate(classes):
        members = raw.train.labels.eq(index).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        test = 0 if raw.test else max(1, round(len(members) / TEST_SHARE))
        rest = len(members) - test
        most = max(1, VALIDATION_MOST // len(classes))
        validation = 0 if raw.validation else min(most, max(1, round(rest / VALIDATION_SHARE)))
        train = rest - validation
        if train < 1:
            raise DataError(
                f"data set {name}: class {label} has {_count(len(members))}; at least"
                f" {1 + bool(test) + bool(validation)} are needed to split them"
            )
        pieces = members.split([test, validation, train])
        for part, piece in zip(("test", "validation", "train"), pieces, strict=True):
            indices[part].append(piece)
    # Index order, so that every part mixes the classes as the data set did.
    parts = {part: raw.train[torch.cat(found).sort().values] for part, found in indices.items()}
    return {
        "train": parts["train"],
        "validation": raw.validation or parts["validation"],
        "test": raw.test or parts["test"],
    }


def _without(raw: RawDataset, names: Sequence[str]) -> RawDataset:
    """`raw` without the files of these names in its folder."""
    if not names:
        return raw
    assert raw.folder is not None
    paths = {os.path.join(raw.folder, name) for name in names}
    rest = raw.map_parts(lambda part: part.without(paths) if isinstance(part, FileSet) else part)
    return replace(rest, skipped=(*raw.skipped, *names))


def _count(images: int) -> str:
    return "1 image" if images == 1 else f"{images:,} images"
