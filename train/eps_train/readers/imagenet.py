"""ImageNet (ILSVRC 2012) in its usual layout: `train` and `val`, in each a folder a class."""

from __future__ import annotations

from pathlib import Path

from eps_train.errors import DataError
from eps_train.images import Source
from eps_train.preprocess import Preprocessing
from eps_train.readers.tree import class_files, file_set, in_words

SIZE = 224
_COVER = 256 / 224  # the shorter side is scaled to 256, of which the middle is taken (paper's code)
_WHAT = (
    "unpack ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar there, the images of each class in"
    " a folder of its own (train/n01440764/*.JPEG, val/n01440764/*.JPEG), or name another folder"
    " with --data-root"
)


def read(root: Path, size: tuple[int, int] | None = None) -> Source:
    """List the files of both parts; `val`, which has labels, becomes the test part.

    The images stay on disk. Whatever classes are there will do: a subset in the same layout too.

    Args:
        root: the folder that holds `train` and `val`.
        size: height and width to crop at the centre; None: 224x224.

    Raises:
        DataError: one of the folders is missing, or not laid out like this.
    """
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise DataError(f"data set imagenet: no folder {part} in {root}; {_WHAT}")
    height, width = size or (SIZE, SIZE)
    preprocessing = Preprocessing(
        resize=(round(height * _COVER), round(width * _COVER)), crop=(height, width), color="rgb"
    )
    try:
        found = {part: class_files(root / part) for part in ("train", "val")}
    except DataError as error:
        raise DataError(f"data set imagenet: {error}; {_WHAT}") from None
    classes = tuple(found["train"].by_class)
    train, test = (
        file_set(root / part, files.by_class, classes, preprocessing)
        for part, files in found.items()
    )
    return Source(
        train=train,
        test=test,
        classes=classes,
        preprocessing=preprocessing,
        folder=root,
        left_out=in_words(found["train"].left_out + found["val"].left_out),
    )
