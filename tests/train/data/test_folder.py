"""A user's own images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eps_core import machine
from eps_core.errors import ConfigError, DamagedImages, DataError
from eps_train.data import dataset, folder
from eps_train.data.images import FileSet, ImageSet


def write_image(
    path: Path, *, size: tuple[int, int] = (6, 5), mode: str = "RGB", value: int = 9
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size[1], size[0]), (value,) * 3 if mode == "RGB" else value).save(path)


def pets(root: Path, *, count: int = 12) -> None:
    for index in range(count):
        write_image(root / "cat" / f"{index:02}.png", value=index)
        write_image(root / "dog" / f"{index:02}.png", value=100 + index)


def test_class_folders_become_classes_in_alphabetical_order(tmp_path: Path) -> None:
    pets(tmp_path)
    source = folder.read_folder(tmp_path)
    assert source.classes == ("cat", "dog")
    assert source.train.images.shape == (24, 3, 6, 5)
    assert source.train.labels.tolist() == [0] * 12 + [1] * 12
    assert source.train.images[:, 0, 0, 0].tolist() == [*range(12), *range(100, 112)]
    assert source.test is None


def test_given_parts_are_used(tmp_path: Path) -> None:
    pets(tmp_path / "train")
    pets(tmp_path / "test", count=2)
    source = folder.read_folder(tmp_path)
    assert len(source.train) == 24
    assert source.validation is None
    assert source.test is not None
    assert len(source.test) == 4


def test_mixed_sizes_need_a_size_and_are_named(tmp_path: Path) -> None:
    pets(tmp_path)
    write_image(tmp_path / "cat" / "large.png", size=(40, 40))
    with pytest.raises(DataError, match=r"images of 2 sizes \(most are 6x5\).*--image-size"):
        folder.read_folder(tmp_path)
    resized = folder.read_folder(tmp_path, folder.ReadOptions(size=(8, 8)))
    assert resized.train.images.shape == (25, 3, 8, 8)


def test_grey_images_stay_grey_and_mixed_modes_become_rgb(tmp_path: Path) -> None:
    for index in range(3):
        write_image(tmp_path / "a" / f"{index}.png", mode="L")
        write_image(tmp_path / "b" / f"{index}.png", mode="L")
    assert folder.read_folder(tmp_path).train.images.shape[1] == 1
    write_image(tmp_path / "a" / "colour.png")
    assert folder.read_folder(tmp_path).train.images.shape[1] == 3


def test_every_mode_among_rgb_keeps_its_look(tmp_path: Path) -> None:
    """Palette, transparency, 16 bits, CMYK and grey, each beside an RGB image of the same look."""
    path = tmp_path / "a" / "image"
    path.parent.mkdir()
    grey = Image.new("RGB", (6, 5), (90, 90, 90))
    grey.save(path.with_name("rgb.png"))
    grey.convert("P", palette=Image.Palette.ADAPTIVE).save(path.with_name("palette.png"))
    grey.convert("RGBA").save(path.with_name("alpha.png"))
    grey.convert("CMYK").save(path.with_name("cmyk.jpg"), quality=100)
    grey.convert("L").save(path.with_name("grey.png"))
    grey.convert("LA").save(path.with_name("grey-alpha.png"))
    deep = np.full((5, 6), 90 << 8, dtype=np.uint16)
    Image.fromarray(deep).save(path.with_name("deep.png"))
    Image.fromarray(deep).save(path.with_name("deep.tif"))
    Image.fromarray(deep.astype(">u2")).save(path.with_name("deep-big-endian.tif"))
    write_image(tmp_path / "b" / "colour.png", size=(5, 6))
    source = folder.read_folder(tmp_path)
    looks = source.train.images[source.train.labels == 0].to(torch.int64)
    assert looks.shape == (9, 3, 5, 6)
    assert (looks - 90).abs().amax() <= 1


def test_grey_modes_of_every_depth_stay_grey(tmp_path: Path) -> None:
    for name, mode in (("a", "L"), ("b", "LA"), ("c", "I;16"), ("d", "1")):
        (tmp_path / name).mkdir()
        Image.new(mode, (6, 5)).save(tmp_path / name / "0.png")
    assert folder.read_folder(tmp_path).preprocessing.color == "grey"


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "dog" / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    with pytest.raises(DataError, match=r"1 of 25 images .*dog/broken\.jpg: not an image"):
        dataset.load(f"folder:{tmp_path}")


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    pets(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    path = tmp_path / "dog" / "cut.bmp"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"dog/cut\.bmp: cannot be decoded"):
        dataset.load(f"folder:{tmp_path}")


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "emu").mkdir()
    with pytest.raises(DataError, match=r"emu: a class folder without images"):
        folder.read_folder(tmp_path)


def test_an_empty_folder_and_a_missing_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no class folders in it"):
        folder.read_folder(tmp_path)
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        folder.read_folder(tmp_path / "nowhere")


def test_images_without_class_folders_are_counted(tmp_path: Path) -> None:
    for index in range(3):
        write_image(tmp_path / f"{index}.png")
    with pytest.raises(DataError, match="no class folders in it but 3 images; put the images of"):
        folder.read_folder(tmp_path)


def test_what_a_file_browser_leaves_behind_is_no_image(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "cat" / "._00.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    assert len(folder.read_folder(tmp_path).train) == 24


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val", "Test"),
        ("TRAIN", "valid", "testing"),
        ("training", "dev", "test"),
        ("seg_train", "eval", "seg_test"),
    ],
)
def test_parts_are_known_by_their_usual_names(names: tuple[str, ...], tmp_path: Path) -> None:
    for count, name in zip((12, 3, 4), names, strict=True):
        pets(tmp_path / name, count=count)
    source = folder.read_folder(tmp_path)
    assert source.classes == ("cat", "dog")
    assert source.validation is not None
    assert source.test is not None
    assert [len(source.train), len(source.validation), len(source.test)] == [24, 6, 8]


def test_a_class_may_be_called_like_a_part(tmp_path: Path) -> None:
    for name in ("bus", "car", "train"):
        write_image(tmp_path / name / "0.png")
    assert folder.read_folder(tmp_path).classes == ("bus", "car", "train")


def test_folders_beside_the_parts_are_named(tmp_path: Path) -> None:
    pets(tmp_path / "train")
    pets(tmp_path / "more")
    assert folder.read_folder(tmp_path).left_out == "the folders more"
    pets(tmp_path / "training")
    with pytest.raises(DataError, match="train and training are both taken for the train part"):
        folder.read_folder(tmp_path)


def test_folds_are_not_taken_for_classes(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        pets(tmp_path / f"fold{number}", count=2)
    write_image(tmp_path / "fold3" / "emu" / "0.png")
    with pytest.raises(DataError, match=r"fold1, fold2, fold3 have the same folders .*cat, dog"):
        folder.read_folder(tmp_path)


def test_a_folder_too_many_is_named(tmp_path: Path) -> None:
    pets(tmp_path / "set" / "all")
    with pytest.raises(
        DataError, match=r"only one folder, all, .* give --dataset folder:.*set/all"
    ):
        folder.read_folder(tmp_path / "set")


def test_sizes_are_those_of_the_upright_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for index in range(6):
        path = tmp_path / "ab"[index % 2] / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (32, 24), index).save(path, exif=exif)
    assert folder.read_folder(tmp_path).preprocessing.crop == (32, 24)
    Image.new("L", (32, 24)).save(tmp_path / "a" / "lying.jpg")
    with pytest.raises(DataError, match="images of 2 sizes"):
        folder.read_folder(tmp_path)


# -- what is found in a folder, and what is not -------------------------------------------------


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    pets(tmp_path / "base")
    root = tmp_path / "set"
    (root / "a").mkdir(parents=True)
    (root / "a" / "more").symlink_to(tmp_path / "base" / "cat")
    (root / "a" / "again").symlink_to(root)
    (root / "b").symlink_to(tmp_path / "base" / "dog")
    found = folder.class_files(root)
    assert {name: len(files) for name, files in found.by_class.items()} == {"a": 12, "b": 12}
    assert found.left_out == {"links that lead in a circle": 1}


def test_every_suffix_that_pillow_reads_is_read_and_the_others_are_counted(tmp_path: Path) -> None:
    pets(tmp_path, count=1)
    for name in ("x.JFIF", "x.jpe", "x.avif", "x.jp2"):
        (tmp_path / "cat" / name).touch()
    for name in ("x.heic", "y.HEIC", "notes.txt", "README", ".DS_Store"):
        (tmp_path / "dog" / name).touch()
    (tmp_path / "loose.png").touch()
    found = folder.class_files(tmp_path)
    assert len(found.by_class["cat"]) == 5
    assert len(found.by_class["dog"]) == 1
    assert folder.describe_files(found.left_out) == "5 files (.heic 2, .png 1, .txt 1, no suffix 1)"


def test_hidden_folders_within_a_class_are_left_alone(tmp_path: Path) -> None:
    pets(tmp_path, count=3)
    write_image(tmp_path / "cat" / ".ipynb_checkpoints" / "0.png")
    write_image(tmp_path / "cat" / "deeper" / "0.png")
    assert len(folder.class_files(tmp_path).by_class["cat"]) == 4


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pets(tmp_path)
    write_image(tmp_path / "cat" / "secret" / "0.png")
    scandir = os.scandir

    def guarded(path: Path) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DataError, match=r"cat/secret: cannot be read: Permission denied"):
        folder.read_folder(tmp_path)


def test_a_class_that_is_a_broken_link_is_named(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "zebra").symlink_to("/gone")
    with pytest.raises(DataError, match=r"zebra: a broken link \(to /gone\)"):
        folder.read_folder(tmp_path)


def test_a_class_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "cat").rename(tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(DataError, match=r"class folder b'caf\\xe9' is not UTF-8; rename it"):
        folder.read_folder(tmp_path)


def test_values_that_use_twelve_of_sixteen_bits_are_said(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for index in range(12):
        path = tmp_path / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 4096, (6, 5), dtype=np.uint16)).save(path)
    warning = dataset.load(f"folder:{tmp_path}").warning
    assert "16-bit images (12) use 12 bits only" in warning
    assert warning.endswith("multiply them by 16")
    Image.fromarray(np.full((6, 5), 40_000, np.uint16)).save(path)
    assert not dataset.load(f"folder:{tmp_path}").warning


def test_damaged_images_can_be_left_out_as_if_they_were_not_there(tmp_path: Path) -> None:
    pets(tmp_path)
    whole = dataset.load(f"folder:{tmp_path}").identity
    broken = [tmp_path / "cat" / "a.png", tmp_path / "dog" / "a.jpg"]
    for path in broken:
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DamagedImages, match="2 of 26 images cannot be read") as error:
        dataset.load(f"folder:{tmp_path}")
    assert sorted(error.value.problems) == sorted(map(str, broken))
    made = dataset.load(f"folder:{tmp_path}", skip_damaged=True)
    assert made.identity.skipped == ("cat/a.png", "dog/a.jpg")
    assert made.identity.sha256 == whole.sha256
    write_image(broken[0])  # repaired, it is still not one of those that were trained on
    assert dataset.load_again(made.identity).identity == made.identity


def test_parts_without_training_images_are_not_taken_for_classes(tmp_path: Path) -> None:
    pets(tmp_path / "val")
    pets(tmp_path / "test")
    with pytest.raises(DataError, match=r"val: a part without .*train; add that, or put all"):
        folder.read_folder(tmp_path)


def test_a_class_that_only_the_test_part_has_is_named(tmp_path: Path) -> None:
    pets(tmp_path / "train")
    pets(tmp_path / "test")
    write_image(tmp_path / "test" / "emu" / "0.png")
    with pytest.raises(DataError, match=r"test/emu: a class that the training part lacks"):
        folder.read_folder(tmp_path)


def test_a_class_of_one_and_a_single_class_are_refused(tmp_path: Path) -> None:
    pets(tmp_path / "both")
    write_image(tmp_path / "both" / "emu" / "0.png")
    with pytest.raises(DataError, match="class emu has 1 image; at least 3 are needed"):
        dataset.load(f"folder:{tmp_path / 'both'}")
    write_image(tmp_path / "one" / "cat" / "0.png")
    with pytest.raises(DataError, match="only one class"):
        dataset.load(f"folder:{tmp_path / 'one'}")


def test_a_moved_folder_is_found_again_through_the_data_root(tmp_path: Path) -> None:
    pets(tmp_path / "here")
    write_image(tmp_path / "here" / "cat" / "large.png", size=(40, 40))
    made = dataset.load(f"folder:{tmp_path / 'here'}", image_size=(8, 8))
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(DataError, match="no such folder"):
        dataset.load_again(made.identity)
    again = dataset.load_again(made.identity, tmp_path / "there")
    assert torch.equal(again.train.images, made.train.images)
    write_image(tmp_path / "there" / "cat" / "00.png", value=200)
    with pytest.raises(DataError, match=r"(not the|test) images .* the checkpoint was"):
        dataset.load_again(made.identity, tmp_path / "there")


# -- sets that are too large to be held ---------------------------------------------------------


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than ten of the images below fit."""
    monkeypatch.setattr(dataset, "room_for_images", lambda: 10 * 3 * 6 * 5)


@pytest.mark.usefixtures("small_memory")
def test_a_large_folder_stays_on_disk_and_is_split_as_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pets(tmp_path, count=50)
    made = dataset.load(f"folder:{tmp_path}")
    monkeypatch.undo()  # of the fixture: now there is room
    held = dataset.load(f"folder:{tmp_path}")
    assert isinstance(made.train, FileSet)
    assert isinstance(held.train, ImageSet)
    assert made.identity.sizes == held.identity.sizes == {"train": 72, "validation": 8, "test": 20}
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(made, part).images, getattr(held, part).images)
        assert torch.equal(getattr(made, part).labels, getattr(held, part).labels)
    assert made.identity.mean == held.identity.mean, "all 72 images are in the sample"
    assert made.identity.std == held.identity.std


@pytest.mark.usefixtures("small_memory")
def test_a_set_on_disk_is_known_again_by_names_sizes_and_labels(tmp_path: Path) -> None:
    pets(tmp_path / "here", count=20)
    made = dataset.load(f"folder:{tmp_path / 'here'}")
    (tmp_path / "here").rename(tmp_path / "there")
    assert dataset.load_again(made.identity, tmp_path / "there").identity == made.identity
    cat, dog = tmp_path / "there" / "cat" / "03.png", tmp_path / "there" / "dog" / "03.png"
    content = cat.read_bytes()
    for change in (
        lambda: cat.write_bytes(content + b"\0"),
        lambda: cat.rename(cat.with_name("3.png")),
        lambda: cat.rename(dog.with_name("03b.png")),
    ):
        change()
        with pytest.raises(DataError, match="not the images that the checkpoint was trained on"):
            dataset.load_again(made.identity, tmp_path / "there")
        for path in (cat.with_name("3.png"), dog.with_name("03b.png")):
            path.unlink(missing_ok=True)
        cat.write_bytes(content)
    assert dataset.load_again(made.identity, tmp_path / "there").identity == made.identity


def test_a_set_is_held_as_it_was_whatever_memory_is_free_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pets(tmp_path, count=20)
    for first, later in ((10**9, 100), (100, 10**9)):
        monkeypatch.setattr(dataset, "room_for_images", lambda room=first: room)
        made = dataset.load(f"folder:{tmp_path}")
        assert made.identity.held == isinstance(made.train, ImageSet) == (first > 100)
        monkeypatch.setattr(dataset, "room_for_images", lambda room=later: room)
        assert dataset.load_again(made.identity).identity == made.identity


@pytest.mark.usefixtures("small_memory")
def test_a_mean_image_needs_a_set_in_memory(tmp_path: Path) -> None:
    pets(tmp_path)
    with pytest.raises(ConfigError, match="--normalization pixel: needs a set that fits in memory"):
        dataset.load(f"folder:{tmp_path}", normalization="pixel")


@pytest.mark.usefixtures("small_memory")
def test_what_does_not_fit_is_not_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pets(tmp_path)
    source = folder.read_folder(tmp_path)
    monkeypatch.setattr(machine, "available_memory", lambda: 500)
    with pytest.raises(DataError, match=r"24 images of 3x6x5 do not fit in .* --image-size"):
        assert source.train.images is None
