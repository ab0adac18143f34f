"""MNIST's file format, on files made here and, where it is installed, on the real Fashion-MNIST."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eps_core.errors import DataError
from eps_train import recipes
from eps_train.data import dataset, downloads
from eps_train.training.trainer import Trainer

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


def idx_bytes(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write_set(folder: Path, *, train: int = 40, test: int = 20) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


@pytest.mark.parametrize("below", ["", "MNIST/raw", "mnist"])
def test_found_in_the_root_and_where_others_put_it(tmp_path: Path, below: str) -> None:
    write_set(tmp_path / below)
    source = downloads.read_idx("mnist", tmp_path)
    assert source.train.images.shape == (40, 1, 28, 28)
    assert source.train.labels.tolist() == [index % 10 for index in range(40)]
    assert source.test is not None
    assert len(source.test) == 20
    assert source.preprocessing.shape == (1, 28, 28)


def test_missing_files_are_named_with_the_place_to_put_them(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data set mnist: no train-images-idx3-ubyte\.gz in .*--data-root"
    ):
        downloads.read_idx("mnist", tmp_path)


def test_gzipped_files_are_read_and_damaged_ones_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    plain = tmp_path / "train-images-idx3-ubyte"
    expected = downloads.read_idx("mnist", tmp_path).train.images
    packed = bytearray(gzip.compress(plain.read_bytes()))
    zipped = plain.with_name(plain.name + ".gz")
    zipped.write_bytes(packed)
    plain.unlink()
    assert torch.equal(downloads.read_idx("mnist", tmp_path).train.images, expected)
    packed[len(packed) // 2] ^= 16
    for damaged in (packed, packed[:-9]):
        zipped.write_bytes(damaged)
        with pytest.raises(DataError, match=r"images-idx3-ubyte\.gz: cannot be unpacked"):
            downloads.read_idx("mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x02ab", "not an IDX file of bytes in 3 dimensions"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 2, 28, 28) + b"short", "do not fit its shape"),
    ],
)
def test_damaged_plain_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    write_set(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        downloads.read_idx("mnist", tmp_path)


needs_fashion = pytest.mark.skipif(
    not FASHION.is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)


@pytest.mark.slow
@needs_fashion
def test_the_real_fashion_mnist() -> None:
    made = dataset.load("fashion-mnist", FASHION)
    assert made.identity.outline == dataset.outline("fashion-mnist")
    assert made.identity.sizes == {"train": 54_000, "validation": 6_000, "test": 10_000}
    assert torch.equal(made.test.labels.bincount(), torch.full((10,), 1_000))
    assert made.identity.mean[0] == pytest.approx(72.9, abs=0.2)  # 0.286 of 255, as published
    assert made.identity.std[0] == pytest.approx(90.0, abs=0.2)  # 0.353 of 255


@pytest.mark.slow
@needs_fashion
def test_one_epoch_of_the_real_fashion_mnist_is_learned_from(tmp_path: Path) -> None:
    """Its own recipe, shortened and smaller, with the paper's normalisation and SVHN's warp."""
    run = replace(
        recipes.recipe("fashion-mnist"),
        model="cifar:8x8",
        epochs=1,
        epsilon=0.0,
        normalization="pixel",
        augmentation="svhn",
        flip=False,
    )
    made = dataset.load(
        "fashion-mnist", FASHION, image_size=run.image_size, normalization=run.normalization
    )
    assert made.identity.input_shape == (1, 14, 14)
    trainer = Trainer(
        run,
        made,
        best_path=tmp_path / "ckpt.pt",
        last_path=tmp_path / "last.pt",
        device=torch.device("cpu"),
    )
    best = trainer.run(lambda report: None)
    assert best.metrics["test"]["samples"] == 10_000
    assert best.metrics["test"]["accuracy"] > 0.7
