"""Time of an epoch: `eps-train` beside timm's training script, on the same network and images.

Each is a command of its own, timm's in an environment of its own. An epoch is what two more epochs
add to a run, halved: start-up is no part of it, validation and checkpoints are. Both read the same
folder of PNG files, 32x32: scikit-learn's digits, enlarged and repeated.

Both: SGD with momentum, batch 128, float32, channels-last, mirroring. timm's images are scaled by a
random resized crop that is fixed to the whole image, ours are shifted by up to 4 pixels. All of our
gates are judged in each step, and stay open.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from _rounds import NotRun, Options, Plan, in_turns, ratio
from PIL import Image

from eps_train import data

SIZE = 32
BATCH = 128
EPOCHS = (1, 3)  # of the short run and of the long one
ROUNDS = 3
COPIES = {"cpu": 2, "cuda": 40}  # of 1,295 training images; 40 make a set of CIFAR's size
OUTPUT = Path("output")  # stands for the folder of a run, which is another each time

Argument = str | int | float | Path


def timm(options: Options) -> Plan:
    """Seconds of an epoch of `eps-train` over those of timm's `train.py`."""
    if options.timm_checkout is None or options.timm_python is None:
        raise NotRun("give --timm-checkout and --timm-python: timm in an environment of its own")
    python, checkout = options.timm_python, options.timm_checkout
    script = checkout / "train.py"
    known = _output([python, script, "--help"])
    folder = tempfile.TemporaryDirectory()
    images = Path(folder.name) / "images"
    counts = _write(images, COPIES[options.device.type])
    device = ["--device", options.device.type] if "--device" in known else []
    commands = {
        "ours": _ours(images, options),
        "timm": [python, script, *_theirs(images, options), *device],
    }
    sides = {
        f"{side}_{epochs}": partial(_seconds, [*command, "--epochs", epochs])
        for side, command in commands.items()
        for epochs in EPOCHS
    }
    # Not counted: the first runs of all compile Python files and fill the system's caches.
    once = sum(run() for run in sides.values())

    def measure() -> dict[str, Any]:
        with folder:
            runs = in_turns(sides, rounds=ROUNDS)
        short, long = EPOCHS
        epoch = {
            side: [
                (more - fewer) / (long - short)
                for fewer, more in zip(runs[f"{side}_{short}"], runs[f"{side}_{long}"], strict=True)
            ]
            for side in commands
        }
        version = "import timm, torch; print(timm.__version__, torch.__version__)"
        return {
            "model": options.timm_model,
            "images": counts,
            "batch_size": BATCH,
            "workers": _workers(),
            "timm_and_its_torch": _output([python, "-c", version], cwd=checkout).split(),
            "seconds_of_an_epoch": {side: statistics.median(e) for side, e in epoch.items()},
            "seconds_of_a_run": {name: statistics.median(found) for name, found in runs.items()},
            **ratio(epoch["ours"], epoch["timm"]),
        }

    return Plan(once * ROUNDS, measure)


def _ours(images: Path, options: Options) -> list[Argument]:
    """The command of `eps-train`, but for the number of epochs."""
    on_gpu = options.device.type == "cuda"
    return [
        *(sys.executable, "-m", "eps_train", "--recipe", "cifar10-110"),
        *("--dataset", f"folder:{images}", "--model", f"timm:{options.timm_model}"),
        *("--batch-size", BATCH, "--rates", "0:0.01", "--normalization", "channel"),
        *("--epsilon", 2.5, "--epsilon-from", max(EPOCHS)),  # judged, and open in every epoch
        *("--device", options.device.type, "--precision", "tf32" if on_gpu else "fp32"),
        *("--output", OUTPUT),
    ]


def _theirs(images: Path, options: Options) -> list[Argument]:
    """What timm's script is told, but for device and number of epochs. On a GPU it uses TF32."""
    return [
        *("--data-dir", images, "--train-split", "train", "--val-split", "val"),
        *("--model", options.timm_model, "--num-classes", 10, "--input-size", 3, SIZE, SIZE),
        *("--batch-size", BATCH, "--opt", "momentum", "--lr", 0.01, "--warmup-epochs", 0),
        *("--smoothing", 0, "--scale", 1, 1, "--ratio", 1, 1, "--color-jitter", 0, "--hflip", 0.5),
        *("--workers", _workers(), "--channels-last", "--checkpoint-hist", 1),
        *("--output", OUTPUT),
    ]


def _seconds(command: list[Argument]) -> float:
    """Wall seconds of a command that writes into a fresh folder."""
    with tempfile.TemporaryDirectory() as output:
        began = time.perf_counter()
        _output([output if part is OUTPUT else part for part in command], cwd=output)
        return time.perf_counter() - began


def _output(command: Sequence[Argument], cwd: Path | str | None = None) -> str:
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(arguments)}\n{done.stderr or done.stdout}")
    return done.stdout


def _workers() -> int:
    """Worker processes of timm's loader: its default, or one a core where there are fewer."""
    return min(4, os.cpu_count() or 1)


def _write(folder: Path, copies: int) -> dict[str, int]:
    """Write digits as colour PNG files, by part and class; returns how many for each part."""
    digits = data.load("digits")
    parts = {"train": digits.train, "val": digits.validation, "test": digits.test}
    for part, images in parts.items():
        for label in range(10):
            (folder / part / str(label)).mkdir(parents=True)
        for index, (pixels, label) in enumerate(zip(images.images, images.labels, strict=True)):
            picture = Image.fromarray(pixels[0].numpy()).convert("RGB").resize((SIZE, SIZE))
            for copy in range(copies if part == "train" else 1):
                picture.save(folder / part / str(int(label)) / f"{index}-{copy}.png")
    return {
        part: len(images) * (copies if part == "train" else 1) for part, images in parts.items()
    }
