"""torchvision can be imported here whatever torch it was built for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

CODE = """
from eps_train.data.downloads import import_torchvision
import_torchvision()
import_torchvision()
from torchvision import datasets, models
print(models.resnet18(num_classes=3).fc.out_features, datasets.CIFAR10.__name__)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="needs the package torchvision"
)
def test_networks_and_readers_work_in_a_fresh_process() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "CIFAR10"]
