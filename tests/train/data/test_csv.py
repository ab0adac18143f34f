"""`csv:PATH`: images and labels listed in a CSV file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eps_core.errors import ConfigError, DamagedImages, DataError
from eps_train.data import dataset, folder

COUNT = 12


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of their own value each, 0.png to 11.png."""
    (tmp_path / "images").mkdir()
    for index in range(COUNT):
        pixels = np.full((6, 5, 3), 20 * index, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    return tmp_path


def write(root: Path, *lines: str) -> Path:
    path = root / "labels.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def listed(root: Path, *, header: str = "path,label", names: str = "ab") -> Path:
    """The images, labelled in turn."""
    rows = (f"images/{index}.png,{names[index % len(names)]}" for index in range(COUNT))
    return write(root, header, *rows)


def test_labels_become_classes_in_alphabetical_order(images: Path) -> None:
    source = folder.read_csv(listed(images, names="zab"))
    assert source.classes == ("a", "b", "z")
    assert source.train.labels.tolist() == [2, 0, 1] * 4
    assert source.train.images[:, 0, 0, 0].tolist() == [20 * index for index in range(COUNT)]
    assert (source.validation, source.test) == (None, None)


def test_numbers_are_in_numerical_order(images: Path) -> None:
    rows = (f"images/{index}.png,{index % 6 * 2}" for index in range(COUNT))
    source = folder.read_csv(write(images, "path,label", *rows))
    assert source.classes == (
        "0",
        "2",
        "4",
        "6",
        "8",
        "10",
    )


def test_columns_in_any_order_quotes_and_a_byte_order_mark(images: Path) -> None:
    path = images / "labels.csv"
    rows = [f'2020,"a, b",images/{index}.png' for index in range(2)]
    path.write_text("\r\n".join([" year , label,path", *rows, ""]), encoding="utf-8-sig")
    source = folder.read_csv(path)
    assert source.classes == ("a, b",)
    assert len(source.train) == 2


def test_given_splits_are_used(images: Path) -> None:
    splits = ["train"] * 6 + ["Training", "train", "val", "valid", "test", "TEST"]
    rows = (f"images/{i}.png,{'ab'[i % 2]},{split}" for i, split in enumerate(splits))
    source = folder.read_csv(write(images, "path,label,split", *rows))
    assert source.validation is not None
    assert source.test is not None
    assert [len(part) for part in (source.train, source.validation, source.test)] == [8, 2, 2]
    assert source.test.images[:, 0, 0, 0].tolist() == [200, 220]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,label", "images/0.png,a"], r"line 1: no column path \(file, label\); the header"),
        (["path;label", "images/0.png;a"], r"line 1: no column path .*separated by commas"),
        ([""], r"line 1: no column path \(empty\)"),
        (["path,label"], "no images are listed below its header"),
        (["path,label", "images/0.png,a", "images/1.png"], "line 3: no label; fill it in"),
        (["path,label", ",a"], "line 2: no path; fill it in"),
        (["path,label,split", "images/0.png,a,"], "line 2: no split"),
        (["path,label", "images/0.png,a,b"], "line 2: more than the 2 values of the header"),
        (["path,label,split", "images/0.png,a,fold1"], "line 2: split fold1: write train, val or"),
        (["path,label,split", "images/0.png,a,test"], "no line has the split train"),
        (
            ["path,label,split", "images/0.png,a,train", "images/1.png,b,test"],
            "line 3: label b: no training image has it",
        ),
        (
            ["path,label", "images/0.png,a", "", "images/x.png,a", "y.png,b"],
            r"line 4: images/x\.png: no such file; paths are relative to .*; 1 more lines",
        ),
        (
            ["path,label", "images/0.png,a", "images/../images/0.png,b"],
            r"line 3: images/\.\./images/0\.png is in line 2 already",
        ),
        (["path,label", '"images/0.png,a'], "line 2: not CSV: unexpected end of data"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(images: Path, lines: list[str], message: str) -> None:
    path = write(images, *lines)
    with pytest.raises(DataError, match=rf"^data set csv:{path}: .*{message}") as error:
        folder.read_csv(path)
    assert "\n" not in str(error.value)


def test_files_that_are_no_tables(images: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv: no such file; name its folder"):
        folder.read_csv(images / "gone.csv")
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        folder.read_csv(images / "images")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        folder.read_csv(images / "images" / "0.png")
    with pytest.raises(ConfigError, match="names no file; write csv:PATH"):
        dataset.load("csv:")


def test_it_is_the_data_set_of_the_folder(images: Path, tmp_path: Path) -> None:
    """The same images, split alike, whether folders or a table name their classes."""
    listed(images)
    made = dataset.load(f"csv:{images / 'labels.csv'}")
    for index in range(COUNT):
        target = tmp_path / "set" / "ab"[index % 2] / f"{index:02}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / "images" / f"{index}.png", target)
    other = dataset.load(f"folder:{tmp_path / 'set'}")
    assert made.identity.sizes == other.identity.sizes
    assert made.identity.preprocessing == other.identity.preprocessing
    found, expected = (
        {
            int(image[0, 0, 0])
            for part in (data.train, data.validation, data.test)
            for image in part.images
        }
        for data in (made, other)
    )
    assert found == expected


def test_damaged_images_are_named_and_skipped_and_found_elsewhere(
    images: Path, tmp_path: Path
) -> None:
    path = listed(images)
    (images / "images" / "3.png").write_bytes(b"\x89PNG")
    with pytest.raises(DamagedImages, match=r"1 of 12 images cannot be read: .*images/3\.png"):
        dataset.load(f"csv:{path}")
    made = dataset.load(f"csv:{path}", skip_damaged=True).identity
    assert made.skipped == ("images/3.png",)
    assert sum(made.sizes.values()) == COUNT - 1
    elsewhere = tmp_path / "moved"
    shutil.copytree(images / "images", elsewhere / "images")
    shutil.copy(path, elsewhere)
    assert dataset.load_again(made, elsewhere).identity == made
    assert made.may_be(f"csv:{elsewhere / 'labels.csv'}")
    assert not made.may_be(f"folder:{elsewhere}")


def test_on_disk_its_digest_follows_the_labels(images: Path) -> None:
    path = listed(images)
    made = dataset.load(f"csv:{path}", room=0).identity
    assert made.held is False
    assert dataset.load_again(made).identity == made
    listed(images, names="ba")
    with pytest.raises(DataError, match="not the images that the checkpoint was trained on"):
        dataset.load_again(made)
