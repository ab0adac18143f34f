"""CIFAR and SVHN: what is said when they are not there. (Their archives are not made here: the
readers check the published MD5 sums.)"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from eps_train import data
from eps_train.errors import DataError


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="needs the package torchvision"
)
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
    with pytest.raises(DataError, match=rf"data set {name}: .*{file}.*--data-root.*--download"):
        data.load(name, tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is fetched unasked"
