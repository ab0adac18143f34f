"""Data sets of Hugging Face's package `datasets`: `hf:PATH` and `hf:NAME`."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from eps_core.errors import DataError
from eps_core.preprocessing import Preprocessing
from eps_train.data.folder import PARTS, ReadOptions, on_disk
from eps_train.data.images import FileSet, RawDataset


@dataclass(frozen=True, eq=False, slots=True)
class RowSet(FileSet):
    """Encoded images in Arrow tables; the names are `SPLIT/ROW`.

    Attributes:
        images_of: column of images by split, not decoded: `bytes` or `path` of each.
    """

    images_of: Mapping[str, Any] = field(kw_only=True)

    def open(self, index: int) -> BinaryIO:
        split, _, row = os.fsdecode(self.names[index]).rpartition("/")
        return _open(self.images_of[split], int(row))

    def size(self, index: int) -> int:
        with self.open(index) as file:
            return file.seek(0, io.SEEK_END)


def _open(images: Any, row: int) -> BinaryIO:
    """Open the image in a row of a table with one column. Raises ValueError where there is none."""
    (image,) = images[row].values()
    if image is None:
        raise ValueError("the row has no image")
    content, path = image["bytes"], image["path"]
    return io.BytesIO(content) if content is not None else Path(path).open("rb")


def read(given: str, root: Path | None, options: ReadOptions) -> RawDataset:
    """Find the images of a data set with one column of images and one of class labels.

    Args:
        given: a folder that `save_to_disk` wrote; otherwise what `datasets.load_dataset` loads, and
            downloads once.
        root: a folder that replaces `given`.
        options: as :func:`~eps_train.data.folder.on_disk` takes them.

    Raises:
        ImportError: `datasets` is not installed.
        DataError: there is no such data set, its columns are ambiguous, or a row has no label.
    """
    import datasets

    name, place = f"hf:{given}", root or Path(given).expanduser()
    try:
        loaded = (
            datasets.load_from_disk(str(place)) if place.is_dir() else datasets.load_dataset(given)
        )
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise DataError(
            f"data set {name}: {problem}; give a folder that save_to_disk wrote, or the name of a"
            " data set on the Hub"
        ) from None
    tables = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    splits = {
        part: split
        for part, usual in PARTS.items()
        for split in reversed(tables)
        if split.lower() in usual
    }
    if "train" not in splits:
        raise DataError(f"data set {name}: its splits are {', '.join(tables)}; name one train")
    features = tables[splits["train"]].features
    image = _column(name, features, datasets.Image)
    label = _column(name, features, datasets.ClassLabel)
    images_of, labels = {}, {}
    for split in splits.values():
        if tables[split].features[label] != features[label]:
            raise DataError(f"data set {name}: split {split} has other classes than the first")
        labels[split] = np.array([-1 if n is None else n for n in tables[split][label]])
        without = np.flatnonzero(labels[split] < 0)
        if len(without):
            raise DataError(
                f"data set {name}: row {without[0]} of split {split} has no label in column {label}"
                f" ({len(without):,} rows have none); remove them"
            )
        raw = tables[split].with_format(None).select_columns([image])
        images_of[split] = raw.cast_column(image, datasets.Image(decode=False))
    files = [partial(_open, rows, row) for rows in images_of.values() for row in range(len(rows))]

    def make(split: str, how: Preprocessing) -> RowSet:
        names = np.array([f"{split}/{row}" for row in range(len(labels[split]))], dtype=np.bytes_)
        numbers = torch.from_numpy(labels[split]).to(torch.int64)
        return RowSet(place, names, numbers, how, images_of=images_of)

    unused = [split for split in tables if split not in splits.values()]
    return on_disk(
        name,
        place,
        files,
        {part: partial(make, split) for part, split in splits.items()},
        classes=tuple(features[label].names),
        options=options,
        left_out=f"the splits {', '.join(unused)}" if unused else "",
    )


def _column(name: str, features: Mapping[str, Any], kind: type) -> str:
    """The column of a type. Raises DataError unless there is exactly one."""
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    if found:
        problem = f"columns {' and '.join(found)} are both of type {kind.__name__}; remove one"
    else:
        every = ", ".join(f"{column} ({type(f).__name__})" for column, f in features.items())
        problem = f"none of its columns is of type {kind.__name__}: {every}; cast one"
    raise DataError(f"data set {name}: {problem}")
