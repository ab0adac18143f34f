"""Images that stay on disk: a data set that is too large to be held."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eps_train import memory
from eps_train.errors import DataError
from eps_train.images import ImageSet
from eps_train.loading import fitting_answer, load
from eps_train.preprocess import Preprocessing, peak_of_sixteen_bits, with_image

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
        if self.nbytes > memory.available():
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
