"""CIFAR, SVHN and MNIST: how they are read, and what is said when they are not there.

The files are made here, of few images, so that the check of the published MD5 sums is left out.
"""

from __future__ import annotations

import importlib.util
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from eps_core.errors import DataError
from eps_train.data import dataset, downloads
from eps_train.data.downloads import import_torchvision

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="needs the package torchvision"
)


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("svhn", "train_32x32.mat"),
    ],
)
def test_missing_files_are_named_with_the_place_to_put_them(
    name: str, file: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        dataset.load(name, tmp_path)
    message = rf"data set {name}: .*{re.escape(file)}.*--data-root.*--download fetch them$"
    assert re.fullmatch(message, str(error.value))
    assert "True" not in str(error.value), "torchvision's advice is for Python programs"
    assert not list(tmp_path.iterdir()), "nothing is downloaded unasked"


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("svhn", "extra_32x32.mat"),
        ("mnist", "t10k-labels-idx1-ubyte.gz"),
        ("fashion-mnist", "train-images-idx3-ubyte.gz"),
    ],
)
def test_without_a_network_one_line_says_what_to_put_where(
    name: str,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for scheme in ("http", "https"):  # a proxy that nobody answers at: no network
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    with pytest.raises(DataError) as error:
        dataset.load(name, tmp_path, download=True)
    message = str(error.value)
    assert message.startswith(f"data set {name}: cannot be downloaded into {tmp_path} (")
    assert "Connection refused" in message
    assert file in message
    assert "\n" not in message
    assert not capsys.readouterr().out


def pixels(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Noise, channels first, as many different images as asked for."""
    return np.random.default_rng(count).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


@needs_torchvision
def test_cifar_keeps_its_images_labels_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_torchvision()
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    whole = pixels(120)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        rows = whole[20 * number : 20 * number + 20].reshape(20, -1)
        batch = {"data": rows, "labels": [index % 10 for index in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = [f"class {number}" for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    source = downloads.read_archive("cifar10", tmp_path)
    assert source.classes == tuple(names)
    assert np.array_equal(source.train.images.numpy(), whole[:100])
    assert source.test is not None
    assert np.array_equal(source.test.images.numpy(), whole[100:])
    assert source.train.labels.tolist() == [index % 10 for index in range(100)]
    assert source.preprocessing.shape == dataset.outline("cifar10").shape


@needs_torchvision
def test_svhn_mixes_train_and_extra_and_counts_ten_as_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    import_torchvision()
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    whole = pixels(60)
    for part, chosen in (("train", whole[:20]), ("extra", whole[20:50]), ("test", whole[50:])):
        labels = np.arange(1, len(chosen) + 1)[:, None] % 10
        labels[labels == 0] = 10
        file = tmp_path / f"{part}_32x32.mat"
        scipy_io.savemat(file, {"X": chosen.transpose(2, 3, 1, 0), "y": labels.astype(np.uint8)})
    source = downloads.read_archive("svhn", tmp_path)
    assert source.classes == tuple("0123456789")
    assert np.array_equal(source.train.images.numpy(), whole[:50])
    assert source.train.labels.tolist()[8:12] == [9, 0, 1, 2]
    assert source.test is not None
    assert np.array_equal(source.test.images.numpy(), whole[50:])
