"""ImageNet's layout, with a handful of images in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eps_core.errors import DataError
from eps_train.data import dataset
from eps_train.data import folder as imagenet
from eps_train.data.images import FileSet

CLASSES = ("n01440764", "n01443537", "n01484850")


def write_set(root: Path, *, train: int = 20, val: int = 3) -> None:
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                size = (*random.integers(30, 60, 2).tolist(), 3)
                pixels = random.integers(0, 256, size, dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{name}_{index}.JPEG")


def test_val_becomes_the_test_part_and_validation_is_split_off(tmp_path: Path) -> None:
    write_set(tmp_path)
    made = dataset.load("imagenet", tmp_path)
    assert isinstance(made.train, FileSet)
    assert made.identity.classes == CLASSES
    assert made.identity.sizes == {"train": 54, "validation": 6, "test": 9}
    assert made.validation.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert made.test.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    held = {made.validation.path(index) for index in range(6)}  # type: ignore[union-attr]
    seen = {made.train.path(index) for index in range(54)}
    assert len(held | seen) == 60
    assert dataset.load("imagenet", tmp_path).identity == made.identity
    assert dataset.load_again(made.identity, tmp_path).identity == made.identity


def test_images_are_scaled_to_256_and_cropped_to_224(tmp_path: Path) -> None:
    write_set(tmp_path, train=3)
    source = imagenet.read_imagenet(tmp_path)
    assert (source.preprocessing.resize, source.preprocessing.crop) == ((256, 256), (224, 224))
    assert source.train.images.shape == (9, 3, 224, 224)
    assert source.preprocessing.shape == dataset.outline("imagenet").shape
    boxed = imagenet.read_imagenet(tmp_path, fit="letterbox").preprocessing
    assert boxed.resize == boxed.crop == (224, 224)
    small = imagenet.read_imagenet(tmp_path, (112, 56)).preprocessing
    assert (small.resize, small.crop) == ((128, 64), (112, 56))


def test_wrong_layouts_are_one_line_that_shows_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data set imagenet: no folder train in .*\.tar there"):
        dataset.load("imagenet", tmp_path)
    write_set(tmp_path)
    for file in tmp_path.glob("val/*/*"):
        file.rename(tmp_path / "val" / file.name)
    for folder in tmp_path.glob("val/n*/"):
        if folder.is_dir():
            folder.rmdir()
    with pytest.raises(DataError, match=r"val: no class folders in it but 9 images.*val/n01440764"):
        dataset.load("imagenet", tmp_path)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(DataError, match="data set imagenet: no folder val in"):
        dataset.load("imagenet", tmp_path)
