"""Images that stay on disk: a data set that is too large to be held."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eps_train import images
from eps_train.errors import DataError
from eps_train.images import ImageSet
from eps_train.loading import load
from eps_train.preprocess import Preprocessing

_CPU = torch.device("cpu")
_CHUNK = 32 << 20  # bytes of pixels that a worker reads at a time, where it is not said


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
        wanted = (slice(start, start + size) for start in range(0, len(self), size))
        pin = self.device.type == "cuda"
        for pixels, labels in load(self.read, wanted, pin=pin, workers=alone):
            yield ImageSet(pixels, labels).to(self.device)

    @property
    def images(self) -> Tensor:
        """All pixels, on `device`. Raises DataError when they are too many to be held."""
        if len(self) * math.prod(self.preprocessing.shape) > images.MEMORY:
            raise DataError(
                f"{self.root}: {len(self):,} images of"
                f" {'x'.join(map(str, self.preprocessing.shape))} do not fit in"
                f" {images.MEMORY >> 30} GiB at once; choose a smaller --image-size"
            )
        return torch.cat([batch.images for batch in self.chunks()])

    def chunks(self) -> Iterator[ImageSet]:
        """As :meth:`batches`, of a size that suits the memory."""
        return self.batches(max(1, _CHUNK // math.prod(self.preprocessing.shape)))

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
