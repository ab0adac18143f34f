"""Data sets of encoded images: class folders, CSV files, Hugging Face's tables, and ImageNet."""

from __future__ import annotations

import csv
import io
import math
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from eps_core.errors import DataError
from eps_core.preprocessing import Preprocessing, upright_size
from eps_train.data.images import FileSet, RawDataset

# -- The files of class folders

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"),
    *(".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)


@dataclass(frozen=True, slots=True)
class ClassFiles:
    """Image files of class folders.

    Attributes:
        by_class: image files relative to `root`, both in alphabetical order.
        left_out: number of other files by their suffixes, and of links that lead nowhere.
    """

    root: Path
    by_class: dict[str, list[str]]
    left_out: Counter[str]

    @property
    def paths(self) -> list[Path]:
        return [self.root / name for names in self.by_class.values() for name in names]

    def labelled(self, classes: Sequence[str], preprocessing: Preprocessing) -> FileSet:
        """The files with the labels of `classes`. Raises DataError for a class not among those."""
        numbers = {name: number for number, name in enumerate(classes)}
        for name in sorted(self.by_class.keys() - numbers.keys()):
            raise DataError(f"{self.root / name}: a class that the training part lacks")
        names = [file for files in self.by_class.values() for file in files]
        labels = [numbers[name] for name, files in self.by_class.items() for _ in files]
        return FileSet.of(self.root, names, labels, preprocessing)


def class_files(root: Path) -> ClassFiles:
    """Find the image files below `root`, one folder per class.

    Images may be in subfolders of their class, and links are followed. Names that begin with a dot
    are ignored. Raises DataError for no class, a class without images, a folder that cannot be
    read, a broken link in the place of a class, and a class whose name is not UTF-8, which later
    commands could not write.
    """
    found = ClassFiles(root, {}, Counter())
    for entry in _entries(root):
        if entry.is_dir():
            continue
        if entry.is_symlink() and not os.path.exists(entry.path):
            target = os.readlink(entry.path)
            raise DataError(f"{entry.path}: a broken link (to {target}); repair or remove it")
        found.left_out[_suffix(entry.name)] += 1
    for name in folders(root):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{root}: the name of class folder {os.fsencode(name)!r} is not UTF-8; rename it"
            ) from None
        files = sorted(_images(found, name, [os.stat(root)]), key=lambda file: file.split(os.sep))
        if not files:
            raise DataError(f"{root / name}: a class folder without images; fill or remove it")
        found.by_class[name] = files
    if not found.by_class:
        loose = loose_images(root)
        among = f" but {loose:,} image{'' if loose == 1 else 's'}" if loose else ""
        raise DataError(
            f"{root}: no class folders in it{among}; put the images of each class in one"
        )
    return found


def folders(root: Path) -> list[str]:
    """Names of the folders in `root`, in alphabetical order; links to folders count too."""
    return sorted(entry.name for entry in _entries(root) if entry.is_dir())


def loose_images(root: Path) -> int:
    return sum(_is_image(entry.name) for entry in _entries(root))


def describe_files(left_out: Mapping[str, int]) -> str:
    """`14 files (.heic 10, .txt 4)`, most frequent first; empty when there are none."""
    if not left_out:
        return ""
    total = sum(left_out.values())
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{kind} {count:,}" for kind, count in kinds[:6])
    more = f", {len(kinds) - 6} other kinds" if len(kinds) > 6 else ""
    return f"{total:,} {'file' if total == 1 else 'files'} ({named}{more})"


def _images(found: ClassFiles, name: str, above: list[os.stat_result]) -> Iterator[str]:
    """Yield the images below the folder `name` of `found.root`, and count the other files.

    `above` are the folders that it was reached through, to tell links that lead in a circle.
    """
    here = os.stat(found.root / name)
    if any(os.path.samestat(here, other) for other in above):
        found.left_out["links that lead in a circle"] += 1
        return
    for entry in _entries(found.root / name):
        path = os.path.join(name, entry.name)
        if entry.is_dir():
            yield from _images(found, path, [*above, here])
        elif _is_image(entry.name):
            yield path
        elif entry.is_symlink() and not os.path.exists(entry.path):
            found.left_out["broken links"] += 1
        else:
            found.left_out[_suffix(entry.name)] += 1


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Contents of a folder, but for names that begin with a dot."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read: {error.strerror}; change its permissions"
        ) from None


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no suffix"


# -- From image files to a data set

PARTS = {  # usual names of the folders of parts in public sets, in any case
    "train": ("train", "training", "trn", "seg_train"),
    "val": ("val", "valid", "validation", "dev", "eval", "seg_val"),
    "test": ("test", "testing", "tests", "tst", "seg_test", "holdout"),
}
OpenFile = Callable[[], BinaryIO]
_GREY_MODES = ("1", "L", "LA")
_SAMPLE = 1_000  # files of a large set that are opened


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How images are to be read."""

    size: tuple[int, int] | None = None  # height and width; None when they all share one size
    fit: str = "crop"  # as in `Preprocessing`
    room: int = sys.maxsize  # bytes of pixels that may be in memory
    known: Preprocessing | None = None  # how they were read before: replaces `size` and `fit`


_DEFAULT = ReadOptions()


def _on_disk(
    name: str,
    folder: Path,
    files: Sequence[OpenFile],
    parts: Mapping[str, Callable[[Preprocessing], FileSet]],
    *,
    classes: tuple[str, ...],
    options: ReadOptions,
    left_out: str,
) -> RawDataset:
    """A data set of parts on disk.

    They are to be read into memory if they take no more than `options.room` bytes there. Of a
    larger set, 1,000 images, the same every time, tell whether it is grey or in color.

    Args:
        name: of the data set, for errors.
        folder, classes, left_out: as in :class:`~eps_train.data.images.RawDataset`.
        files: open the images of all parts.
        parts: make each of them, by the keys of :data:`PARTS`.
        options: how to read.
    """
    how = options.known or _preprocessing(name, files, options)
    made = {part: make(how) for part, make in parts.items()}
    return RawDataset(
        train=made["train"],
        validation=made.get("val"),
        test=made.get("test"),
        classes=classes,
        preprocessing=how,
        folder=folder,
        held=len(files) * math.prod(how.shape) <= options.room,
        left_out=left_out,
    )


def _preprocessing(name: str, files: Sequence[OpenFile], options: ReadOptions) -> Preprocessing:
    """How to read the files: grey when every image is, else RGB; in the given or common size."""
    size = options.size
    every = None if size else _sizes(files)
    if every is not None:
        if not every[0]:
            raise DataError(f"data set {name}: none of its images can be read")
        (size, _), *others = every[0].most_common()
        if others:
            raise DataError(
                f"data set {name}: images of {len(every[0])} sizes (most are"
                f" {size[0]}x{size[1]}); choose one with --image-size"
            )
    assert size is not None
    few = random.Random(0).sample(files, min(len(files), _SAMPLE))
    grey = _sizes(few)[1]
    if len(files) * math.prod(size) * (1 if grey else 3) <= options.room:
        grey = (every or _sizes(files))[1]
    return Preprocessing(resize=size, crop=size, color="grey" if grey else "rgb", fit=options.fit)


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def _sizes(files: Sequence[OpenFile]) -> tuple[Counter[tuple[int, int]], bool]:
    """Upright sizes (height, width) of images, and whether all are grey; from their headers alone.

    Files that cannot be opened are skipped: reading the pixels names them.
    """
    from PIL import Image

    sizes: Counter[tuple[int, int]] = Counter()
    grey = True
    for opened in files:
        try:
            with opened() as file, Image.open(file) as image:
                sizes[upright_size(image)] += 1
                grey = grey and (image.mode in _GREY_MODES or image.mode.startswith(("I", "F")))
        except Exception:  # Pillow raises many types for damaged files
            continue
    return sizes, grey


# -- `folder:PATH`


def read_folder(folder: Path, options: ReadOptions = _DEFAULT) -> RawDataset:
    """Find every image below `folder`.

    `folder` has class folders, or `train` (and perhaps `val`, `test`) with class folders in each.
    Raises DataError that names the folder or image that is missing, empty, or of another size.
    """
    if not folder.is_dir():
        raise DataError(f"data set folder:{folder}: no such folder; name it with --data-root")
    roots, unused = _roots(folder)
    found = {part: class_files(root) for part, root in roots.items()}
    classes = tuple(found["train"].by_class)
    others = describe_files(sum((files.left_out for files in found.values()), Counter[str]()))
    left_out = [others, f"the folders {', '.join(unused)}" if unused else ""]
    return _on_disk(
        f"folder:{folder}",
        folder,
        [partial(_open, path) for files in found.values() for path in files.paths],
        {part: partial(files.labelled, classes) for part, files in found.items()},
        classes=classes,
        options=options,
        left_out=" and ".join(filter(None, left_out)),
    )


def _roots(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The folder of the class folders of each part, and the folders that are not used.

    Without a folder of training data, all of them are training data. A folder named like a part is
    one when there are folders in it: `train` may also be a class, beside `bus` and `car`.
    """
    inner = {name: folders(folder / name) for name in folders(folder)}
    named: dict[str, list[str]] = defaultdict(list)
    for part, usual in PARTS.items():
        named[part] = [name for name, below in inner.items() if below and name.lower() in usual]
        if len(named[part]) > 1:
            raise DataError(
                f"data set folder:{folder}: {' and '.join(named[part])} are both taken for the"
                f" {part} part; remove one of them"
            )
    roots = {part: folder / names[0] for part, names in named.items() if names}
    if "train" in roots:
        return roots, [name for name in inner if folder / name not in roots.values()]
    if roots:
        root, *_ = roots.values()
        raise DataError(
            f"{root}: a part without {folder / 'train'}; add that, or put all class folders"
            f" directly into {folder}"
        )
    # No parts: what is in `folder` must be classes, not folders of classes.
    outer = [name for name in inner if not loose_images(folder / name)]
    if len(inner) == 1 and outer and inner[outer[0]]:
        raise DataError(
            f"data set folder:{folder}: only one folder, {outer[0]}, with folders in it; if those"
            f" are the classes, give --dataset folder:{folder / outer[0]}"
        )
    shared = set.intersection(*map(set, inner.values())) if inner else set()
    if len(inner) > 1 and len(outer) == len(inner) and len(shared) > 1:
        raise DataError(
            f"data set folder:{folder}: all of {_few(list(inner))} have the same folders in them"
            f" ({_few(sorted(shared))}): they look like parts of the data, not like classes;"
            f" name them train, val and test, or put the class folders directly into {folder}"
        )
    return {"train": folder}, []


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


# -- `csv:PATH`: a table with the columns path, label, and perhaps split


class _Row(NamedTuple):
    """A line of the table; `file` is relative to the table's folder, `part` a key of `PARTS`."""

    line: int
    file: str
    label: str
    part: str


def read_csv(path: Path, options: ReadOptions = _DEFAULT) -> RawDataset:
    """Find every image that a CSV file lists.

    The header of `path` has the columns `path` (relative to the file's folder), `label` and perhaps
    `split`. The classes are in alphabetical order, or in numerical order where all labels are
    numbers. Raises DataError that names the line that is incomplete, or whose file is missing or
    listed twice, or whose split or label is unknown.
    """
    name, rows = f"csv:{path}", list(_rows(path))
    if not rows:
        raise DataError(f"data set {name}: no images are listed below its header")
    first: dict[str, int] = {}
    for row in rows:
        line = first.setdefault(os.path.normpath(row.file), row.line)
        if line != row.line:
            raise _bad_line(path, row.line, f"{row.file} is in line {line} already; keep one")
    missing = [row for row in rows if not os.path.isfile(path.parent / row.file)]
    if missing:
        line, file, *_ = missing[0]
        more = f"; {len(missing) - 1:,} more lines are like it" if missing[1:] else ""
        problem = f"{file}: no such file; paths are relative to {path.parent}{more}"
        raise _bad_line(path, line, problem)
    by_part: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        by_part[row.part].append(row)
    if "train" not in by_part:
        raise DataError(f"data set {name}: no line has the split train")
    found = {row.label for row in by_part["train"]}
    classes = tuple(sorted(found, key=int if all(map(str.isdecimal, found)) else None))
    numbers = {label: number for number, label in enumerate(classes)}
    for row in rows:
        if row.label not in numbers:
            raise _bad_line(path, row.line, f"label {row.label}: no training image has it")
    parts = {
        part: partial(
            FileSet.of,
            path.parent,
            [row.file for row in listed],
            [numbers[row.label] for row in listed],
        )
        for part, listed in by_part.items()
    }
    files = [partial(_open, path.parent / row.file) for row in rows]
    return _on_disk(name, path.parent, files, parts, classes=classes, options=options, left_out="")


def _rows(path: Path) -> Iterator[_Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            header = [column.strip() for column in table.fieldnames or ()]
            table.fieldnames = header
            for column in ("path", "label"):
                if column not in header:
                    raise _bad_line(
                        path,
                        1,
                        f"no column {column} ({', '.join(header) or 'empty'}); the header must have"
                        " path and label, and may have split, separated by commas",
                    )
            columns = [column for column in ("path", "label", "split") if column in header]
            for fields in table:
                values = {column: (fields[column] or "").strip() for column in columns}
                for column, value in values.items():
                    if not value:
                        raise _bad_line(path, table.line_num, f"no {column}; fill it in")
                line = table.line_num
                if None in fields:
                    raise _bad_line(
                        path,
                        line,
                        f"more than the {len(header)} values of the header; put a value that has a"
                        " comma in quotes",
                    )
                split = values.get("split", "train")
                part = next((p for p, usual in PARTS.items() if split.lower() in usual), None)
                if part is None:
                    raise _bad_line(path, line, f"split {split}: write train, val or test")
                yield _Row(line, values["path"], values["label"], part)
    except FileNotFoundError:
        problem = "no such file; name its folder with --data-root"
        raise DataError(f"data set csv:{path}: {problem}") from None
    except OSError as error:
        raise DataError(f"data set csv:{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        problem = "is not UTF-8 text; save it as CSV in UTF-8"
        raise DataError(f"data set csv:{path}: {problem}") from None
    except csv.Error as error:
        raise _bad_line(path, table.line_num + 1, f"not CSV: {error}") from None


def _bad_line(path: Path, line: int, problem: str) -> DataError:
    return DataError(f"data set csv:{path}: line {line:,}: {problem}")


# -- `hf:PATH` and `hf:NAME`: data sets of Hugging Face's package `datasets`


@dataclass(frozen=True, eq=False, slots=True)
class RowSet(FileSet):
    """Encoded images in Arrow tables; the names are `SPLIT/ROW`.

    Attributes:
        images_of: column of images by split, not decoded: `bytes` or `path` of each.
    """

    images_of: Mapping[str, Any] = field(kw_only=True)

    def open(self, index: int) -> BinaryIO:
        split, _, row = os.fsdecode(self.names[index]).rpartition("/")
        return _open_row(self.images_of[split], int(row))

    def size(self, index: int) -> int:
        with self.open(index) as file:
            return file.seek(0, io.SEEK_END)


def _open_row(images: Any, row: int) -> BinaryIO:
    """Open the image in a row of a table with one column. Raises ValueError where there is none."""
    (image,) = images[row].values()
    if image is None:
        raise ValueError("the row has no image")
    content, path = image["bytes"], image["path"]
    return io.BytesIO(content) if content is not None else Path(path).open("rb")


def read_huggingface(given: str, root: Path | None, options: ReadOptions) -> RawDataset:
    """Find the images of a data set with one column of images and one of class labels.

    Args:
        given: a folder that `save_to_disk` wrote; otherwise what `datasets.load_dataset` loads, and
            downloads once.
        root: a folder that replaces `given`.
        options: how to read the images.

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
    files = [
        partial(_open_row, rows, row) for rows in images_of.values() for row in range(len(rows))
    ]

    def make(split: str, how: Preprocessing) -> RowSet:
        names = np.array([f"{split}/{row}" for row in range(len(labels[split]))], dtype=np.bytes_)
        numbers = torch.from_numpy(labels[split]).to(torch.int64)
        return RowSet(place, names, numbers, how, images_of=images_of)

    unused = [split for split in tables if split not in splits.values()]
    return _on_disk(
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


# -- ImageNet (ILSVRC 2012) in its usual layout: `train` and `val`, each with one folder per class

SIZE = 224
_COVER = 256 / 224  # the shorter side is scaled to 256, of which the middle is taken (paper's code)
_WHAT = (
    "unpack ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar there, the images of each class in"
    " a folder of its own (train/n01440764/*.JPEG, val/n01440764/*.JPEG), or name another folder"
    " with --data-root"
)


def read_imagenet(root: Path, size: tuple[int, int] | None = None, fit: str = "crop") -> RawDataset:
    """List the files of both parts; `val`, which has labels, becomes the test part.

    They stay on disk. A subset of the classes in the same layout is read too. The images are
    cropped at the centre to height and width `size`, 224 by default; with `fit` `letterbox` they
    are not. Raises DataError when one of the folders is missing, or not laid out like this.
    """
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise DataError(f"data set imagenet: no folder {part} in {root}; {_WHAT}")
    height, width = size or (SIZE, SIZE)
    cover = _COVER if fit == "crop" else 1.0
    preprocessing = Preprocessing(
        resize=(round(height * cover), round(width * cover)),
        crop=(height, width),
        color="rgb",
        fit=fit,
    )
    try:
        train, test = (class_files(root / part) for part in ("train", "val"))
    except DataError as error:
        raise DataError(f"data set imagenet: {error}; {_WHAT}") from None
    classes = tuple(train.by_class)
    return RawDataset(
        train=train.labelled(classes, preprocessing),
        test=test.labelled(classes, preprocessing),
        classes=classes,
        preprocessing=preprocessing,
        folder=root,
        left_out=describe_files(train.left_out + test.left_out),
    )
