"""A bundle to serve, made with `eps-train`, `eps-compact` and `eps-deploy`.

The images are noise and training is two steps: neither time nor size depends on the weights.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import numpy as np
from PIL import Image

CLASSES = 10
SIZE = 32
_PICTURES = {"train": 4, "val": 2, "test": 4}  # images per class


def make_bundle(folder: Path, depth: int) -> Path:
    """Make the bundle of a network of the CIFAR family for 32x32 images in `folder`."""
    _write_pictures(folder / "pictures")
    commands = [
        "eps-train --recipe cifar10-110 --dataset folder:pictures --epochs 1 --batch-size 20"
        f" --model cifar:{depth}x16 --epsilon-warmup 1 --device cpu",
        "eps-compact ckpt.pt",
        "eps-deploy --engine ort --time-budget 0.4 --min-speedup 0",
    ]
    for command in commands:
        name, *arguments = command.split()
        done = subprocess.run(
            [script(name), *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise click.ClickException(f"{command}\n{done.stdout}{done.stderr}")
    return folder / "bundle"


def script(name: str) -> Path:
    """Path of a console script in the environment of this process."""
    return Path(sys.executable).parent / name


def _write_pictures(folder: Path) -> None:
    chance = np.random.default_rng(0)
    for part, count in _PICTURES.items():
        for label in range(CLASSES):
            (folder / part / str(label)).mkdir(parents=True)
            for index in range(count):
                pixels = chance.integers(0, 256, size=(SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / str(label) / f"{index}.png")
