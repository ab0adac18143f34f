"""Labelled images, in memory or on disk, and the worker processes that read them."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eps_core import machine
from eps_core.errors import DataError, reader_death
from eps_core.preprocessing import ChooseBox, Preprocessing, peak_of_sixteen_bits, with_image

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images uint8 `[N, C, H, W]` with labels int64 `[N]`, in memory."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> ImageSet:
        return ImageSet(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device))

    def batches(self, size: int) -> Iterator[ImageSet]:
        """In order, `size` at a time; the last batch may be smaller."""
        return map(ImageSet, self.images.split(size), self.labels.split(size))

    def update(self, digest: hashlib._Hash) -> None:
        """Add shape, every pixel and every label to `digest`."""
        digest.update(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)

    def preprocessed(self, preprocessing: Preprocessing) -> ImageSet:
        """As `preprocessing` reads image files: training and `eps-predict` see the same pixels."""
        from PIL import Image

        pixels = np.empty((len(self), *preprocessing.shape), dtype=np.uint8)
        for index, image in enumerate(self.images.permute(0, 2, 3, 1).numpy()):
            pixels[index] = preprocessing.apply(
                Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            )
        return ImageSet(torch.from_numpy(pixels), self.labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class RawDataset:
    """A data set as its reader found it, before it is split.

    Attributes:
        train, validation, test: its parts; those that are None are to be split off `train`.
        classes: label names by index.
        preprocessing: from an image file to the same pixels.
        folder: folder of the image files; None where the data set does not consist of them.
        held: whether parts on disk are to be read into memory once they are split.
        left_out: description of the other files in the folder.
        skipped: damaged files that are not used, relative to `folder`.
    """

    train: Part
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    validation: Part | None = None
    test: Part | None = None
    folder: Path | None = None
    held: bool = False
    left_out: str = ""
    skipped: tuple[str, ...] = ()

    def map_parts(self, change: Callable[[Any], Part]) -> RawDataset:
        return replace(
            self,
            train=change(self.train),
            validation=self.validation and change(self.validation),
            test=self.test and change(self.test),
        )


# -- Worker processes that read from disk while the device computes

Request = TypeVar("Request")
Answer = TypeVar("Answer")

MOST_WORKERS = 16
_AHEAD = 2  # answers that each worker reads ahead
_BESIDES = 2  # answers in use or on the way, however many workers there are


def local_processes() -> int:
    """Processes of this run on this machine, which share its cores and memory (torchrun)."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def worker_count() -> int:
    """One worker per core, shared out among the processes of a `torchrun`; none on one core."""
    workers = machine.cpus() // local_processes()
    return min(workers, MOST_WORKERS) if workers > 1 else 0


def _fitting_workers(wanted: int, answer_bytes: int) -> int:
    """Number of workers, at most `wanted`, whose answers fit in shared memory."""
    room = machine.shared_memory()
    if room is None or not answer_bytes:
        return wanted
    answers = room // local_processes() // answer_bytes
    return max(0, min(wanted, (answers - _BESIDES) // _AHEAD))


def load(
    read: Callable[[Request], Answer],
    requests: Iterable[Request],
    *,
    pin: bool = False,
    workers: int | None = None,
    answer_bytes: int = 0,
) -> Iterator[Answer]:
    """Answer requests in worker processes, in order, some ahead of time.

    The workers live until the last answer, or until this iterator is dropped.

    Args:
        read: from a request to a tuple of tensors and other objects; picklable.
        requests: what to read; without tensors, which would be sent through shared memory.
        pin: return the tensors in pinned memory, for asynchronous copies to a GPU.
        workers: number of processes; 0 reads in this one; None: :func:`worker_count`.
        answer_bytes: size of the tensors of an answer; where shared memory is short (64 MB in a
            container by default), fewer workers are started, or none.

    Raises:
        DataError: what `read` raised, or a worker died, or shared memory ran out.
    """
    count = _fitting_workers(worker_count() if workers is None else workers, answer_bytes)
    loader: DataLoader[Any] = DataLoader(
        _Reading(read, shared=count > 0),
        batch_size=None,
        sampler=requests,
        num_workers=count,
        prefetch_factor=_AHEAD if count else None,
        pin_memory=pin,
        worker_init_fn=_prepare_worker,
        # Its own, else every start would draw from the generator that networks draw from.
        generator=torch.Generator(),
    )
    answers = iter(loader)
    while True:
        try:
            answer = next(answers)
        except StopIteration:
            return
        except RuntimeError as error:
            if (death := reader_death(error)) is None:
                raise
            raise DataError(death) from None
        if isinstance(answer, _ReadError):
            raise DataError(answer)
        yield answer


class _ReadError(str):
    """The message of a DataError: raised in a worker, it would arrive with a stack trace in it."""


class _Reading(Dataset[Any]):
    def __init__(self, read: Callable[[Any], Any], *, shared: bool) -> None:
        self._read, self._shared = read, shared

    def __getitem__(self, request: Any) -> Any:
        try:
            answer = self._read(request)
            if self._shared:
                _share(answer)
        except DataError as error:
            return _ReadError(error)
        return answer


def _share(answer: Any) -> None:
    """Move the tensors of an answer into shared memory. Raises DataError.

    torch would do so in a background thread of the worker, where it prints the error and drops the
    answer, and the main process would wait for it for ever.
    """
    try:
        for item in answer:
            if isinstance(item, Tensor):
                item.share_memory_()
    except RuntimeError as error:
        raise DataError(
            "shared memory is full of images that were read ahead"
            f" ({str(error).splitlines()[0]}); in a container, give it more (--shm-size 8g)"
        ) from None


def _prepare_worker(worker: int) -> None:
    """Leave Ctrl-C to the main process, and silence Pillow's warnings of odd files."""
    # It reaches every process of a terminal, but the main one still wants to finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")


# -- Images that stay on disk

_CPU = torch.device("cpu")
_CHUNK = 2 << 20  # bytes of pixels that a worker scans at a time: many fit in shared memory


@dataclass(slots=True)
class ScanStatistics:
    """What decoding every file of a part showed."""

    problems: dict[str, str] = field(default_factory=dict)  # a line that names the file, by path
    deep: int = 0  # number of grey images with 16 bits
    peak: int = 0  # largest value, 0..65535, in any of those

    def add(self, other: ScanStatistics) -> None:
        self.problems |= other.problems
        self.deep += other.deep
        self.peak = max(self.peak, other.peak)


@dataclass(frozen=True, eq=False, slots=True)
class FileSet:
    """Image files with labels, read on every access.

    Attributes:
        root: folder that the names are relative to.
        names: file names as bytes `[N]`: an array, because worker processes would copy every one
            of a million Python strings by merely counting references to it.
        labels: int64 `[N]`, on the CPU.
        preprocessing: from a file to its pixels.
        device: where :meth:`batches` puts its images.
    """

    root: Path
    names: npt.NDArray[np.bytes_]
    labels: Tensor
    preprocessing: Preprocessing
    device: torch.device = _CPU

    @classmethod
    def of(
        cls, root: Path, names: Sequence[str], labels: Sequence[int], preprocessing: Preprocessing
    ) -> FileSet:
        encoded = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        return cls(root, encoded, torch.tensor(labels, dtype=torch.int64), preprocessing)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> FileSet:
        return replace(self, names=self.names[index.cpu().numpy()], labels=self.labels[index.cpu()])

    def without(self, paths: Collection[str]) -> FileSet:
        stays = [str(self.path(index)) not in paths for index in range(len(self))]
        return self[torch.tensor(stays, dtype=torch.bool).nonzero().flatten()]

    def to(self, device: torch.device) -> FileSet:
        return replace(self, device=device)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.names[index])

    def open(self, index: int) -> BinaryIO:
        return self.path(index).open("rb")

    def size(self, index: int) -> int:
        return os.stat(self.path(index)).st_size

    def read(self, index: Sequence[int], crops: Sequence[ChooseBox] = ()) -> tuple[Tensor, Tensor]:
        """Read images in this process: as evaluation does, or the box that `crops` choose of each.

        Returns pixels uint8 `[n, C, H, W]` and labels int64 `[n]`. Raises DataError that names a
        file that cannot be read.
        """
        how = self.preprocessing
        pixels = np.empty((len(index), *how.shape), dtype=np.uint8)
        for row, number in enumerate(index):
            use = partial(how.apply_crop, choose=crops[row]) if crops else how.apply
            pixels[row] = self._with_image(number, use)
        return torch.from_numpy(pixels), self.labels[list(index)]

    def batches(self, size: int) -> Iterator[ImageSet]:
        """As `ImageSet.batches`, read by worker processes. Raises DataError that names a file."""
        memory, pin = size * self._image_bytes, self.device.type == "cuda"
        for pixels, labels in self._load(self.read, size, answer_bytes=memory, pin=pin):
            yield ImageSet(pixels, labels).to(self.device)

    @property
    def images(self) -> Tensor:
        """All pixels, on `device`. Raises DataError when they do not fit in memory."""
        if len(self) * self._image_bytes > machine.available_memory():
            raise self._too_large()
        part, found = self.scan(keep=True)
        for problem in found.problems.values():
            raise DataError(problem)
        return part.images.to(self.device)

    def scan(self, *, keep: bool) -> tuple[Part, ScanStatistics]:
        """Decode every file once.

        With `keep` the images are returned in the memory of the CPU (the pixels of a bad file are
        0), which takes no more memory than they and a few chunks; otherwise this set. Raises
        DataError when they do not fit in memory.
        """
        total, size = ScanStatistics(), max(1, _CHUNK // self._image_bytes)
        try:
            count = len(self) if keep else 0
            pixels = torch.empty((count, *self.preprocessing.shape), dtype=torch.uint8)
        except (MemoryError, RuntimeError):
            raise self._too_large() from None
        start, read, memory = 0, partial(self._scan, keep=keep), keep * size * self._image_bytes
        for chunk, found in self._load(read, size, answer_bytes=memory):
            pixels[start : start + len(chunk)] = chunk
            start += len(chunk)
            total.add(found)
        return (ImageSet(pixels, self.labels) if keep else self), total

    def update(self, digest: hashlib._Hash) -> None:
        """Add every name (below the root), file size and label, and how files are read.

        To hash the pixels would take as long as an epoch. So an image that is replaced by another
        of the same size in bytes goes unnoticed.
        """
        how = self.preprocessing
        digest.update((repr(how) + ("" if how.fit == "crop" else how.fit)).encode())
        separator = os.fsencode(os.sep)
        for index, name in enumerate(self.names.tolist()):
            digest.update(name.replace(separator, b"/") + b"\0%d\0" % self.size(index))
        digest.update(self.labels.numpy().data)

    @property
    def _image_bytes(self) -> int:
        return math.prod(self.preprocessing.shape)

    def _load(
        self, read: Callable[[range], Answer], size: int, *, answer_bytes: int, pin: bool = False
    ) -> Iterator[Answer]:
        """:func:`load` all images, `size` per request."""
        every = range(len(self))
        requests = [every[start : start + size] for start in every[::size]]
        alone = 0 if len(requests) <= 1 else None  # a single batch is not worth a process
        return load(read, requests, pin=pin, workers=alone, answer_bytes=answer_bytes)

    def _with_image(self, index: int, use: Callable[[Image.Image], T]) -> T:
        return with_image(self.path(index), use, partial(self.open, index))

    def _scan(self, index: range, *, keep: bool) -> tuple[Tensor, ScanStatistics]:
        """Pixels uint8 `[n, C, H, W]`, none unless `keep`, and the statistics of these files."""
        how, found = self.preprocessing, ScanStatistics()
        pixels = np.zeros((len(index) if keep else 0, *how.shape), dtype=np.uint8)
        for row, number in enumerate(index):
            try:
                peak, image = self._with_image(
                    number, lambda i: (peak_of_sixteen_bits(i), how.apply(i))
                )
            except DataError as error:
                found.problems[str(self.path(number))] = str(error)
                continue
            found.deep += peak > 0
            found.peak = max(found.peak, peak)
            if keep:
                pixels[row] = image
        return torch.from_numpy(pixels), found

    def _too_large(self) -> DataError:
        needed = len(self) * self._image_bytes / 2**30
        return DataError(
            f"{self.root}: {len(self):,} images of"
            f" {'x'.join(map(str, self.preprocessing.shape))} do not fit in the memory that is"
            f" free ({needed:.1f} GiB are needed); choose a smaller --image-size"
        )


Part: TypeAlias = ImageSet | FileSet
"""A part of a data set: in memory or on disk."""
