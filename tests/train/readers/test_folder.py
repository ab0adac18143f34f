"""A user's own pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eps_train import data
from eps_train.errors import DataError
from eps_train.readers import folder


def picture(
    path: Path, *, size: tuple[int, int] = (6, 5), mode: str = "RGB", value: int = 9
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size[1], size[0]), (value,) * 3 if mode == "RGB" else value).save(path)


def pets(root: Path, *, count: int = 12) -> None:
    for index in range(count):
        picture(root / "cat" / f"{index:02}.png", value=index)
        picture(root / "dog" / f"{index:02}.png", value=100 + index)


def test_class_folders_become_classes_in_alphabetical_order(tmp_path: Path) -> None:
    pets(tmp_path)
    source = folder.read(tmp_path)
    assert source.classes == ("cat", "dog")
    assert source.train.images.shape == (24, 3, 6, 5)
    assert source.train.labels.tolist() == [0] * 12 + [1] * 12
    assert source.train.images[:, 0, 0, 0].tolist() == [*range(12), *range(100, 112)]
    assert source.test is None


def test_given_parts_are_used(tmp_path: Path) -> None:
    pets(tmp_path / "train")
    pets(tmp_path / "test", count=2)
    source = folder.read(tmp_path)
    assert len(source.train) == 24
    assert source.validation is None
    assert source.test is not None
    assert len(source.test) == 4


def test_mixed_sizes_need_a_size_and_are_named(tmp_path: Path) -> None:
    pets(tmp_path)
    picture(tmp_path / "cat" / "large.png", size=(40, 40))
    with pytest.raises(DataError, match=r"images of 2 sizes \(most are 6x5\).*--image-size"):
        folder.read(tmp_path)
    assert folder.read(tmp_path, (8, 8)).train.images.shape == (25, 3, 8, 8)


def test_grey_images_stay_grey_and_mixed_modes_become_rgb(tmp_path: Path) -> None:
    for index in range(3):
        picture(tmp_path / "a" / f"{index}.png", mode="L")
        picture(tmp_path / "b" / f"{index}.png", mode="L")
    assert folder.read(tmp_path).train.images.shape[1] == 1
    picture(tmp_path / "a" / "colour.png")
    assert folder.read(tmp_path).train.images.shape[1] == 3


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "dog" / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    with pytest.raises(DataError, match=r"dog/broken\.jpg: cannot be read as an image"):
        folder.read(tmp_path)


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    pets(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    path = tmp_path / "dog" / "cut.bmp"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"dog/cut\.bmp: cannot be decoded"):
        folder.read(tmp_path)


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "emu").mkdir()
    with pytest.raises(DataError, match=r"emu: a class folder without images"):
        folder.read(tmp_path)


def test_an_empty_folder_and_a_missing_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no class folders in it"):
        folder.read(tmp_path)
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        folder.read(tmp_path / "nowhere")


def test_a_class_that_only_the_test_part_has_is_named(tmp_path: Path) -> None:
    pets(tmp_path / "train")
    pets(tmp_path / "test")
    picture(tmp_path / "test" / "emu" / "0.png")
    with pytest.raises(DataError, match=r"test/emu: a class that .*train lacks"):
        folder.read(tmp_path)


def test_a_class_of_one_and_a_single_class_are_refused(tmp_path: Path) -> None:
    pets(tmp_path / "both")
    picture(tmp_path / "both" / "emu" / "0.png")
    with pytest.raises(DataError, match="class emu has 1 images; at least 3 are needed"):
        data.load(f"folder:{tmp_path / 'both'}")
    picture(tmp_path / "one" / "cat" / "0.png")
    with pytest.raises(DataError, match="only one class"):
        data.load(f"folder:{tmp_path / 'one'}")


def test_a_moved_folder_is_found_again_through_the_data_root(tmp_path: Path) -> None:
    pets(tmp_path / "here")
    picture(tmp_path / "here" / "cat" / "large.png", size=(40, 40))
    made = data.load(f"folder:{tmp_path / 'here'}", image_size=(8, 8))
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(DataError, match="no such folder"):
        data.load_again(made.identity)
    again = data.load_again(made.identity, tmp_path / "there")
    assert torch.equal(again.train.images, made.train.images)
    picture(tmp_path / "there" / "cat" / "00.png", value=200)
    with pytest.raises(DataError, match="not the images that the checkpoint was trained on"):
        data.load_again(made.identity, tmp_path / "there")
