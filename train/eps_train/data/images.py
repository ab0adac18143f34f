"""Images with labels: held as raw pixels, or to be read from their files."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eps_core.errors import DataError, reader_death
from eps_core.preprocessing import Preprocessing, peak_of_sixteen_bits, with_image

MEMORY = 8 << 30  # bytes of pixels that were held at most by runs that do not say what they held


class Part(Protocol):
    """A part of a data set, in memory (:class:`ImageSet`) or on disk (`files.FileSet`)."""

    @property
    def images(self) -> Tensor:
        """All of them, uint8 `[N, C, H, W]`; of a part on disk, read now, every time."""

    @property
    def labels(self) -> Tensor:
        """Int64 `[N]`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Part:
        """The images at an int64 `[M]` index."""

    def to(self, device: torch.device) -> Part:
        """The same, with :meth:`batches` on `device`."""

    def batches(self, size: int) -> Iterator[ImageSet]:
        """In order, `size` at a time; the last batch may be smaller."""

    def update(self, digest: hashlib._Hash) -> None:
        """Add to `digest` what makes this part the one it is."""


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

    def batches(self, size: int) -> Iterator[ImageSet]:
        return map(ImageSet, self.images.split(size), self.labels.split(size))

    def update(self, digest: hashlib._Hash) -> None:
        """Shape, every pixel, every label."""
        digest.update(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)

    def through(self, preprocessing: Preprocessing) -> ImageSet:
        """The same images as `preprocessing` brings a file that holds one of them to the network.

        So what a run is trained on and what `eps-predict` makes of the original picture are alike.
        """
        from PIL import Image

        pixels = np.empty((len(self), *preprocessing.shape), dtype=np.uint8)
        for index, image in enumerate(self.images.permute(0, 2, 3, 1).numpy()):
            pixels[index] = preprocessing.apply(
                Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            )
        return ImageSet(torch.from_numpy(pixels), self.labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a reader found, before it is split.

    Attributes:
        train: images to train on, or all images when there are no other parts.
        validation, test: parts that the source itself keeps apart; None: to be split off.
        classes: label names by index.
        preprocessing: from an image file to the same pixels.
        folder: that the files lie in; None where they are no images that one could look at.
        held: whether parts that consist of files are to be read into memory once they are split.
        left_out: what lies in the folder and is not used, in words.
        skipped: files that were there, damaged, and are not used, below `folder`.
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

    def resized(self, size: tuple[int, int]) -> Source:
        """All parts, which lie in memory, brought to `size` (height, width)."""
        preprocessing = replace(self.preprocessing, resize=size, crop=size)

        def through(part: Part) -> ImageSet:
            assert isinstance(part, ImageSet)
            return part.through(preprocessing)

        return replace(
            self,
            preprocessing=preprocessing,
            train=through(self.train),
            validation=self.validation and through(self.validation),
            test=self.test and through(self.test),
        )


# -- Free memory of this machine or container: RAM, and shared memory for reader processes

SHARED = Path("/dev/shm")  # where processes hand tensors to each other on Linux
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes of RAM that can be taken without swapping: what the machine or its cgroup has left.

    Linux says so itself. Elsewhere it is all the RAM that the machine has.
    """
    machine = _machine()
    if machine is None:
        machine = _installed()
    return min([machine, *_cgroup_rooms()])


def shared() -> int | None:
    """Free bytes of shared memory; None where it has no limit of its own."""
    try:
        found = os.statvfs(SHARED)
    except (AttributeError, OSError):  # no such call, or no such place
        return None
    return found.f_bavail * found.f_frsize


def local_processes() -> int:
    """Processes of this run on this machine, which share its memory (torchrun)."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _machine() -> int | None:
    for line in _lines(_PROC / "meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _installed() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no such call
        return sys.maxsize


def _cgroup_rooms() -> list[int]:
    """What is left below the limit of every cgroup that this process is in, of both versions."""
    rooms = []
    for line in _lines(_PROC / "self" / "cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, limit, usage = _CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit = _CGROUPS / "memory", "memory.limit_in_bytes"
            usage = "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's, while the files lie at the root.
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            room = _room(folder, limit, usage) if folder.is_relative_to(root) else None
            if room is not None:
                rooms.append(room)
    return rooms


def _room(folder: Path, limit: str, usage: str) -> int | None:
    most, used = (_lines(folder / name) for name in (limit, usage))
    if not most or not used or not most[0].strip().isdecimal():  # "max": no limit
        return None
    # The kernel gives back cached files that nobody has looked at lately.
    names = ("inactive_file", "total_inactive_file")
    statistics = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    cached = max([int(statistics[name]) for name in names if name in statistics], default=0)
    return max(0, int(most[0]) - int(used[0]) + cached)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


# -- Worker processes that read from disk while the device computes

Request = TypeVar("Request")
Answer = TypeVar("Answer")

MOST_WORKERS = 16
_AHEAD = 2  # answers that each worker may be ahead of who asked
_BESIDES = 2  # answers in use or on the way, however many workers there are


def worker_count() -> int:
    """One worker a core, shared out among the processes of a `torchrun`; none on one core."""
    affinity = getattr(os, "sched_getaffinity", None)  # what a container may use; Linux has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    workers = cores // local_processes()
    return min(workers, MOST_WORKERS) if workers > 1 else 0


def fitting_answer(wanted: int, smallest: int) -> int:
    """Bytes of an answer, `wanted` at most, of which all workers find room in shared memory.

    It is not below `smallest`, for which :func:`load` may have to take fewer workers.
    """
    room = shared()
    if room is None:
        return wanted
    share = room // local_processes() // (_AHEAD * worker_count() + _BESIDES)
    return max(smallest, min(wanted, share))


def _fitting_workers(wanted: int, answer_bytes: int) -> int:
    """How many workers find room for their answers in shared memory, `wanted` at most."""
    room = shared()
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
        read: from a request to an answer, tensors perhaps among it, by that request alone; it is
            sent to the workers, so it must be picklable.
        requests: what to read.
        pin: hand the tensors over in pinned memory, from where a GPU fetches them by itself.
        workers: processes; 0 reads in this one; None: :func:`worker_count`.
        answer_bytes: of the tensors in an answer; where shared memory is short (64 MB in a
            container, if nothing is said), fewer workers are started, or none.

    Raises:
        DataError: what `read` raised, or that a worker died, or that shared memory ran out.
    """
    wanted = worker_count() if workers is None else workers
    count = _fitting_workers(wanted, answer_bytes)
    loader: DataLoader[Any] = DataLoader(
        _Reading(read, shared=count > 0),
        batch_size=None,
        sampler=map(_sent, requests),
        num_workers=count,
        prefetch_factor=_AHEAD if count else None,
        pin_memory=pin,
        collate_fn=_as_it_is,
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
        if isinstance(answer, _Refusal):
            raise DataError(answer)
        yield answer


class _Refusal(str):
    """The message of a DataError: raised in a worker, it would arrive with a stack trace in it."""


class _Reading(Dataset[Any], Generic[Request, Answer]):
    def __init__(self, read: Callable[[Request], Answer], *, shared: bool) -> None:
        self._read, self._shared = read, shared

    def __getitem__(self, request: Request) -> Answer | _Refusal:
        try:
            answer = self._read(_received(request))
            if self._shared:
                _share(answer)
        except DataError as error:
            return _Refusal(error)
        return answer


def _sent(request: Any) -> Any:
    """A request without tensors, which would be sent by way of shared memory, as arrays instead."""
    if isinstance(request, tuple):
        return tuple(item.numpy() if isinstance(item, Tensor) else item for item in request)
    return request


def _received(request: Any) -> Any:
    """Inverse of :func:`_sent`."""
    if isinstance(request, tuple):
        return tuple(
            torch.from_numpy(item) if isinstance(item, np.ndarray) else item for item in request
        )
    return request


def _share(answer: Any) -> None:
    """Move the tensors of an answer into shared memory.

    torch would do so in a thread behind the worker, where it prints what went wrong and drops the
    answer, for which the main process then waits for ever. Raises DataError.
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


def _as_it_is(answer: Any) -> Any:
    return answer


def _prepare_worker(worker: int) -> None:
    """Leave Ctrl-C to the main process, and Pillow's remarks on odd files unsaid."""
    # It reaches every process of a terminal, but the main one still wants to finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")


# -- Images that stay on disk: a data set that is too large to be held

_CPU = torch.device("cpu")
_CHUNK = 32 << 20  # bytes of pixels that a worker reads at a time, where it is not said


@dataclass(slots=True)
class Findings:
    """What a look at every file of a part found.

    Attributes:
        problems: files that cannot be used, by path, one line each that names the file.
        deep: images that are grey with 16 bits.
        peak: largest value, 0..65535, in any of those.
    """

    problems: dict[str, str] = field(default_factory=dict)
    deep: int = 0
    peak: int = 0

    def add(self, other: Findings) -> None:
        self.problems |= other.problems
        self.deep += other.deep
        self.peak = max(self.peak, other.peak)


@dataclass(frozen=True, eq=False, slots=True)
class FileSet:
    """Image files with labels, read whenever they are looked at.

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
        """The set without the files at `paths`."""
        kept = [str(self.path(index)) not in paths for index in range(len(self))]
        return self[torch.tensor(kept, dtype=torch.bool).nonzero().flatten()]

    def to(self, device: torch.device) -> FileSet:
        return replace(self, device=device)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.names[index])

    def read(self, index: slice) -> tuple[Tensor, Tensor]:
        """Pixels uint8 `[n, C, H, W]` and labels int64 `[n]`, in this process."""
        chosen = range(*index.indices(len(self)))
        pixels = np.empty((len(chosen), *self.preprocessing.shape), dtype=np.uint8)
        for row, number in enumerate(chosen):
            pixels[row] = self.preprocessing.read(self.path(number))
        return torch.from_numpy(pixels), self.labels[index].clone()

    def batches(self, size: int) -> Iterator[ImageSet]:
        """As `Part.batches`, read by worker processes. Raises DataError that names a bad file."""
        alone = 0 if len(self) <= size else None  # a single batch is not worth a process
        pin = self.device.type == "cuda"
        answers = load(
            self.read,
            self._slices(size),
            pin=pin,
            workers=alone,
            answer_bytes=size * self._image_bytes,
        )
        for pixels, labels in answers:
            yield ImageSet(pixels, labels).to(self.device)

    @property
    def images(self) -> Tensor:
        """All pixels, on `device`. Raises DataError when they are too many to be held."""
        if self.nbytes > available():
            raise self._too_large()
        held, found = self.hold()
        for problem in found.problems.values():
            raise DataError(problem)
        return held.images.to(self.device)

    def chunks(self) -> Iterator[ImageSet]:
        """As :meth:`batches`, of a size that suits the memory."""
        return self.batches(self._chunk)

    def hold(self) -> tuple[ImageSet, Findings]:
        """All images, in the memory of the CPU, and what was found; a bad one's pixels are 0.

        No more memory is taken than they need, and some chunks. Raises DataError when there is not
        as much.
        """
        try:
            pixels = torch.empty((len(self), *self.preprocessing.shape), dtype=torch.uint8)
        except (MemoryError, RuntimeError):
            raise self._too_large() from None
        found, start = Findings(), 0
        for chunk, part in self._looked_at(keep=True):
            pixels[start : start + len(chunk)] = chunk
            start += len(chunk)
            found.add(part)
        return ImageSet(pixels, self.labels), found

    def check(self) -> Findings:
        """Decode every file once, and keep nothing of it."""
        found = Findings()
        for _, part in self._looked_at(keep=False):
            found.add(part)
        return found

    @property
    def nbytes(self) -> int:
        """Of all pixels."""
        return len(self) * self._image_bytes

    @property
    def _image_bytes(self) -> int:
        return math.prod(self.preprocessing.shape)

    @property
    def _chunk(self) -> int:
        """Images that a worker reads at a time, where it is not said."""
        return max(1, fitting_answer(_CHUNK, self._image_bytes) // self._image_bytes)

    def _slices(self, size: int) -> Iterator[slice]:
        return (slice(start, start + size) for start in range(0, len(self), size))

    def _looked_at(self, *, keep: bool) -> Iterator[tuple[Tensor, Findings]]:
        size = self._chunk
        return load(
            partial(self._look, keep=keep),
            self._slices(size),
            workers=0 if len(self) <= size else None,
            answer_bytes=size * self._image_bytes if keep else 0,
        )

    def _look(self, index: slice, *, keep: bool) -> tuple[Tensor, Findings]:
        """Pixels uint8 `[n, C, H, W]`, if they are to be kept, and what was found there."""
        chosen, found = range(*index.indices(len(self))), Findings()
        how = self.preprocessing
        pixels = np.zeros((len(chosen) if keep else 0, *how.shape), dtype=np.uint8)
        for row, number in enumerate(chosen):
            path = self.path(number)
            try:
                peak, image = with_image(path, lambda i: (peak_of_sixteen_bits(i), how.apply(i)))
            except DataError as error:
                found.problems[str(path)] = str(error)
                continue
            found.add(Findings(deep=int(peak > 0), peak=peak))
            if keep:
                pixels[row] = image
        return torch.from_numpy(pixels), found

    def _too_large(self) -> DataError:
        return DataError(
            f"{self.root}: {len(self):,} images of"
            f" {'x'.join(map(str, self.preprocessing.shape))} do not fit in the memory that is"
            f" free ({self.nbytes / 2**30:.1f} GiB are needed); choose a smaller --image-size"
        )

    def update(self, digest: hashlib._Hash) -> None:
        """Every name (below the root), file size and label, and how files are read.

        To hash the pixels would take as long as an epoch. So an image that is replaced by another
        of the same size in bytes goes unnoticed.
        """
        digest.update(repr(self.preprocessing).encode())
        root, separator = os.fsencode(self.root), os.fsencode(os.sep)
        for name in self.names.tolist():
            size = os.stat(os.path.join(root, name)).st_size
            digest.update(name.replace(separator, b"/") + b"\0%d\0" % size)
        digest.update(self.labels.numpy().data)
