"""A folder of images that was moved after training is found again with --data-root."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eps_compact.cli import main as compact
from eps_deploy.cli.deploy import main as deploy
from eps_deploy.cli.verify import main as verify
from eps_train.data import dataset
from tests.checkpoints import make_checkpoint
from tests.commands import Result, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its compact network, and its images in a place that neither knows."""
    folder = tmp_path_factory.mktemp("moved")
    images = folder / "images"
    random = np.random.default_rng(0)
    for label in range(10):
        (images / str(label)).mkdir(parents=True)
        for index in range(20):
            pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(images / str(label) / f"{index}.png")
    identity = replace(dataset.load(f"folder:{images}").identity, name="folder:images")
    checkpoint = make_checkpoint(depth=14, dead=("stages.1.1",))
    replace(checkpoint, data=identity).save(folder / "ckpt.pt")
    images.rename(folder / "elsewhere")
    assert command("eps-compact", compact, folder, "ckpt.pt", "--no-data").code == 0
    return folder


def command(name: str, main: Callable[[], object], folder: Path, *args: object) -> Result:
    return run(name, main, *args, cwd=folder)


@pytest.mark.parametrize(
    ("name", "main", "args"),
    [
        ("eps-compact", compact, ("ckpt.pt", "--dry-run")),
        ("eps-deploy", deploy, ("--engine", "ort", "--dry-run")),
    ],
    ids=["eps-compact", "eps-deploy"],
)
def test_what_needs_the_images_finds_them(
    folder: Path, name: str, main: Callable[[], object], args: tuple[object, ...]
) -> None:
    assert "images: " in command(name, main, folder, *args).error
    result = command(name, main, folder, *args, "--data-root", "elsewhere")
    assert result.code == 0, result.stderr


def test_verification_looks_at_the_images(folder: Path) -> None:
    """Where it does not find them, random ones must do."""
    for args, looked in (((), None), (("--data-root", "elsewhere"), True)):
        result = command("eps-verify", verify, folder, "compact.pt", "--json", *args)
        assert result.code == 0, result.stderr
        checks = {check["name"]: check["passed"] for check in json.loads(result.stdout)["checks"]}
        assert checks["data"] is looked
