"""Splits that are fixed for good, and data sets that say who they are."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eps_core import checksummed, machine
from eps_core.errors import ConfigError, DataError
from eps_core.preprocessing import Preprocessing
from eps_train.data import dataset
from eps_train.data.dataset import Data, DataIdentity
from eps_train.data.images import ImageSet, Part, RawDataset
from eps_train.models.resnets import Normalize

PREPROCESSING = Preprocessing(resize=(2, 2), crop=(2, 2), color="rgb")
PARTS = ("train", "validation", "test")


def numbered(*counts: int) -> ImageSet:
    """Mixed images, `counts` of each class, that carry their index in their first two pixels."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))]
    images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    index = torch.arange(len(labels))
    images[:, 0, 0, 0], images[:, 0, 0, 1] = (index // 256).byte(), (index % 256).byte()
    return ImageSet(images, labels)


def split(whole: ImageSet, classes: int) -> Data:
    return dataset.split(source(whole, classes), name="made")


def source(train: ImageSet, classes: int, **parts: ImageSet) -> RawDataset:
    names = tuple("abcdefgh"[:classes])
    made = RawDataset(train=train, classes=names, preprocessing=PREPROCESSING)
    return replace(made, **parts)  # type: ignore[arg-type]


def indices(part: Part) -> list[int]:
    pixels = part.images[:, 0, 0].to(torch.int64)
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


def test_images_take_half_of_the_free_memory_shared_by_the_processes_of_a_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 1600)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert dataset.room_for_images() == 800
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert dataset.room_for_images() == 200


def test_parts_are_disjoint_and_cover_everything() -> None:
    whole = numbered(400, 37, 3)
    made = split(whole, 3)
    found = {part: indices(getattr(made, part)) for part in PARTS}
    assert sorted(chain(*found.values())) == list(range(440))
    for part, members in found.items():
        assert members == sorted(members), "in the order of the source"
        assert torch.equal(getattr(made, part).labels, whole.labels[members])
    assert made.identity.sizes == {part: len(members) for part, members in found.items()}


def test_every_class_is_split_alike() -> None:
    made = split(numbered(400, 37, 3), 3)
    counts = {part: getattr(made, part).labels.bincount().tolist() for part in PARTS}
    # A fifth for the test part, a tenth of the rest for validation, at least one of each.
    assert counts == {"test": [80, 7, 1], "validation": [32, 3, 1], "train": [288, 27, 1]}


def test_mean_and_std_are_those_of_the_training_part() -> None:
    whole = numbered(50, 50)
    whole.images.random_(0, 256, generator=torch.Generator().manual_seed(0))
    made = split(whole, 2)
    pixels = made.train.images.numpy().astype(np.float64)
    np.testing.assert_allclose(made.identity.mean, pixels.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(made.identity.std, pixels.std(axis=(0, 2, 3), ddof=1))


def test_pixel_normalisation_takes_off_the_mean_image_and_divides_by_128() -> None:
    whole = numbered(50, 50)
    whole.images.random_(0, 256, generator=torch.Generator().manual_seed(0))
    made = dataset.split(source(whole, 2), name="made", normalization="pixel")
    expected = made.train.images.numpy().astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(np.array(made.identity.mean), expected, rtol=1e-12)
    assert made.identity.std == (128.0, 128.0, 128.0)
    assert made.identity.normalization == "pixel"
    assert made.identity.sha256 == split(whole, 2).identity.sha256, "the images are the same"
    normalize = Normalize.of(made.identity)
    found = normalize(made.train.images).double()
    np.testing.assert_allclose(found.mean(dim=0), np.zeros((3, 2, 2)), atol=1e-6)
    pixel = (made.train.images[5, 2, 1, 0].item() - expected[2, 1, 0]) / 128
    assert found[5, 2, 1, 0].item() == pytest.approx(pixel, abs=1e-6)


def test_a_constant_channel_is_not_divided_by_zero() -> None:
    assert min(split(numbered(10, 10), 2).identity.std) >= 1


def test_same_images_same_identity_and_any_change_another() -> None:
    made = split(numbered(30, 30), 2)
    assert split(numbered(30, 30), 2).identity == made.identity
    pixel, label = numbered(30, 30), numbered(30, 30)
    pixel.images[17, 2, 1, 1] ^= 1
    label.labels[17] ^= 1
    hashes = {made.identity.sha256, *(split(s, 2).identity.sha256 for s in (pixel, label))}
    assert len(hashes) == 3


def test_no_more_than_ten_thousand_images_are_held_out_for_validation() -> None:
    labels = torch.arange(240_000) % 3
    labels[:30_000] = 0
    images = labels.to(torch.uint8).view(-1, 1, 1, 1)
    how = Preprocessing(resize=(1, 1), crop=(1, 1), color="grey")
    large = RawDataset(
        train=ImageSet(images, labels),
        test=ImageSet(images[:9], labels[:9]),
        classes=("a", "b", "c"),
        preprocessing=how,
    )
    assert dataset.split(large, name="made").validation.labels.bincount().tolist() == [3333] * 3


def test_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="data set made: only one class"):
        split(numbered(30), 1)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_tiny_classes_are_named(count: int) -> None:
    with pytest.raises(DataError, match=f"class b has {count} images?; at least 3 are needed"):
        split(numbered(30, count), 2)


def test_digits() -> None:
    digits = dataset.load("digits")
    identity = digits.identity
    assert identity.sizes == {"train": 1295, "validation": 143, "test": 359}
    assert identity.classes == tuple("0123456789")
    assert identity.input_shape == (1, 8, 8)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.amax() == 255
    # Checkpoints are compared with this: if it changes, none finds its data again.
    assert identity.sha256 == "61b129d78477aa3632e96f55638411cdc2c9f94c6d0d6942a9270627e5f3cc10"


def test_loaded_again_only_if_nothing_changed() -> None:
    digits = dataset.load("digits")
    again = dataset.load_again(digits.identity)
    assert torch.equal(again.test.images, digits.test.images)
    other = replace(digits.identity, sha256="0" * 64, digests={})
    with pytest.raises(DataError, match=r"data set digits: not the images .*; point --data-root"):
        dataset.load_again(other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("test", "its test images are not those that the checkpoint was tested on"),
        ("validation", "trained on, beginning with its validation part"),
        ("train", "trained on, beginning with its train part"),
    ],
)
def test_the_part_that_changed_is_named(
    changed: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = split(numbered(30, 30), 2)
    parts = {part: getattr(made, part) for part in PARTS}
    images = parts[changed].images.clone()
    images[0, 0, 0, 0] ^= 1
    parts[changed] = ImageSet(images, parts[changed].labels)
    other = dataset.split(
        source(parts["train"], 2, test=parts["test"], validation=parts["validation"]), name="made"
    )
    monkeypatch.setattr(dataset, "load", lambda *_, **__: other)
    with pytest.raises(DataError, match=message):
        dataset.load_again(made.identity)


def test_parts_that_the_source_keeps_apart_stay_as_they_are() -> None:
    held, checked = numbered(3, 4), numbered(2, 1)
    whole = numbered(40, 50)
    made = dataset.split(source(whole, 2, test=held, validation=checked), name="made")
    assert made.test is held
    assert made.validation is checked
    assert sorted(indices(made.train)) == list(range(90))
    with_test = dataset.split(source(whole, 2, test=held), name="made")
    assert with_test.validation.labels.bincount().tolist() == [4, 5]
    assert sorted(indices(with_test.train) + indices(with_test.validation)) == list(range(90))


def test_a_known_set_is_brought_to_another_size_as_its_image_files_would_be() -> None:
    digits, larger = dataset.load("digits"), dataset.load("digits", image_size=(16, 12))
    assert larger.identity.input_shape == (1, 16, 12)
    assert larger.identity.outline == dataset.outline("digits", (16, 12))
    assert larger.identity.sha256 != digits.identity.sha256
    for part in PARTS:
        before, after = getattr(digits, part), getattr(larger, part)
        assert torch.equal(after.labels, before.labels), "split alike"
        image_file = Image.fromarray(before.images[3, 0].numpy())
        expected = larger.identity.preprocessing.apply(image_file)
        assert np.array_equal(after.images[3].numpy(), expected)
    again = dataset.load_again(larger.identity)
    assert torch.equal(again.test.images, larger.test.images)
    assert dataset.load("digits", image_size=(8, 8)).identity == digits.identity


def test_unknown_data_sets_are_listed_beside_the_known() -> None:
    with pytest.raises(
        ConfigError, match=r"--dataset mnist2: unknown; the data sets are: .*digits"
    ):
        dataset.load("mnist2")


@pytest.mark.parametrize("normalization", ["channel", "pixel"])
def test_identity_survives_a_file(normalization: str, tmp_path: Path) -> None:
    identity = dataset.load("digits", normalization=normalization).identity
    checksummed.write(tmp_path / "a", {"format": "f", "version": 1, "data": identity.to_dict()})
    payload, _ = checksummed.read(tmp_path / "a", format="f", version=1)
    assert DataIdentity.from_dict(payload["data"]) == identity
    assert dataset.load_again(identity).identity == identity


def test_identities_written_before_there_were_mean_images_still_load() -> None:
    fields = {
        "name": "digits",
        "classes": ["0", "1"],
        "mean": [77.5],
        "std": [91.25],
        "preprocessing": PREPROCESSING.to_dict(),
        "split_seed": 0,
        "sizes": {"train": 8, "validation": 1, "test": 1},
        "sha256": "0" * 64,
    }
    identity = DataIdentity.from_dict(fields)
    assert (identity.mean, identity.std) == ((77.5,), (91.25,))
    assert identity.normalization == "channel"
    fit = {**PREPROCESSING.to_dict(), "fit": "crop"}
    added: dict[str, object] = {"preprocessing": fit, "digests": {}, "held": None, "skipped": []}
    assert identity.to_dict() == {**fields, **added}


def test_outline_of_digits_is_that_of_the_loaded_set() -> None:
    assert dataset.outline("digits") == dataset.load("digits").identity.outline
