"""`hf:PATH`: data sets of Hugging Face's package, which is not among the test requirements."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eps_core.errors import DamagedImages, DataError
from eps_train.cli import main
from eps_train.data import dataset, folder
from eps_train.data.folder import ReadOptions
from tests.commands import run


def test_without_the_package_one_line_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run("eps-train", main, "--dataset", "hf:pets", "--dry-run", cwd=tmp_path)
    assert result.code == 1
    assert "datasets is not installed; pip install 'eps-resnet[hf]'" in result.error


def test_no_name(tmp_path: Path) -> None:
    result = run("eps-train", main, "--dataset", "hf:", "--dry-run", cwd=tmp_path)
    assert result.code == 1
    assert "names no data set; write hf:PATH or hf:NAME" in result.error


def pixels(value: int) -> Image.Image:
    return Image.fromarray(np.full((6, 5, 3), value, dtype=np.uint8))


def table(count: int, first: int = 0, **more: Any) -> Any:
    """Images of their own value, labelled in turn, with `more` columns: (feature, values)."""
    hf = pytest.importorskip("datasets")
    columns: dict[Any, Any] = {
        "id": (hf.Value("int64"), list(range(count))),
        "photo": (hf.Image(), [pixels(first + 5 * row) for row in range(count)]),
        "animal": (hf.ClassLabel(names=["dog", "cat"]), [row % 2 for row in range(count)]),
        **more,
    }
    return hf.Dataset.from_dict(
        {name: values for name, (_, values) in columns.items()},
        features=hf.Features({name: feature for name, (feature, _) in columns.items()}),
    )


@pytest.mark.parametrize("room", [0, None])
def test_one_table_is_split_and_found_again(tmp_path: Path, room: int | None) -> None:
    table(20).save_to_disk(tmp_path / "pets")
    made = dataset.load(f"hf:{tmp_path / 'pets'}", room=room)
    assert made.identity.classes == ("dog", "cat")
    assert made.identity.sizes == {"train": 14, "validation": 2, "test": 4}
    assert made.identity.held is (room is None)
    values = {
        int(image[0, 0, 0]): int(label)
        for part in (made.train, made.validation, made.test)
        for image, label in zip(part.images, part.labels, strict=True)
    }
    assert values == {5 * row: row % 2 for row in range(20)}
    assert dataset.load_again(made.identity).identity == made.identity
    moved = (tmp_path / "pets").rename(tmp_path / "moved")
    assert dataset.load_again(made.identity, moved).identity == made.identity


def test_splits_by_their_names(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    tables = {"train": table(8), "validation": table(4, 100), "test": table(2, 200)}
    hf.DatasetDict(**tables, extra=table(2)).save_to_disk(tmp_path / "pets")
    source = folder.read_huggingface(str(tmp_path / "pets"), None, ReadOptions())
    assert source.validation is not None
    assert source.test is not None
    assert [len(part) for part in (source.train, source.validation, source.test)] == [8, 4, 2]
    assert source.test.images[:, 0, 0, 0].tolist() == [200, 205]
    assert source.left_out == "the splits extra"


def test_damaged_and_missing_images_are_named_and_skipped(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    photos = [pixels(row) for row in range(20)]
    bad = {"bytes": b"\x89PNG", "path": None}
    table(20, photo=(hf.Image(), [*photos[:7], bad, None, *photos[9:]])).save_to_disk(
        tmp_path / "pets"
    )
    name = f"hf:{tmp_path / 'pets'}"
    with pytest.raises(DamagedImages, match=r"2 of 20 images .*pets/train/\d: ") as error:
        dataset.load(name)
    assert "the row has no image" in str(error.value)
    made = dataset.load(name, skip_damaged=True).identity
    assert made.skipped == ("train/7", "train/8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("mask", "Image"), "columns photo and mask are both of type Image; remove one"),
        (("kind", "ClassLabel"), "columns animal and kind are both of type ClassLabel"),
        (("photo", None), r"none of its columns is of type Image: id \(Value\), photo"),
        (("animal", -1), r"row 0 of split train has no label in column animal \(4 rows"),
    ],
)
def test_ambiguous_columns(tmp_path: Path, change: tuple[str, Any], message: str) -> None:
    hf = pytest.importorskip("datasets")
    name, kind = change
    columns: dict[Any, Any] = {
        "Image": (hf.Image(), [pixels(0)] * 4),
        "ClassLabel": (hf.ClassLabel(names=["a"]), [0] * 4),
        None: (hf.Value("string"), ["x.png"] * 4),
        -1: (hf.ClassLabel(names=["a"]), [-1] * 4),
    }
    table(4, **{name: columns[kind]}).save_to_disk(tmp_path / "pets")
    with pytest.raises(DataError, match=message):
        folder.read_huggingface(str(tmp_path / "pets"), None, ReadOptions())


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="give a folder that save_to_disk wrote"):
        folder.read_huggingface(str(tmp_path), None, ReadOptions())
