"""timm benchmark: time per epoch of `eps-train` and of timm's training script, interleaved.

Each is a separate command, timm's in its own environment, on the same network and images. An epoch
is the time between two lines of the run's log, from the end of the first epoch on: it excludes
start-up and includes validation and checkpoints. Both read the same folder of 32x32 PNG files:
scikit-learn's digits, enlarged and repeated.

Both use SGD with momentum, batch 128, float32, channels-last and mirroring. timm's images pass a
random resized crop fixed to the whole image; those of eps-train are shifted by up to 4 pixels.
Every gate of eps-train decides in each step and stays open.
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

from eps_train.data import dataset

SIZE = 32
BATCH = 128
EPOCHS = 3
ROUNDS = 8
LOGS = {"ours": "metrics.jsonl", "timm": "*/summary.csv"}  # logs that grow once per epoch
_LOOK = 0.01  # seconds between two reads of a log
COPIES = {"cpu": 4, "cuda": 40}  # of 1,295 training images; 40 copies are CIFAR's size
OUTPUT = Path("output")  # placeholder for the folder of a run

Argument = str | int | float | Path


def timm(options: Options) -> Plan:
    """Seconds per epoch of `eps-train` over those of timm's `train.py`."""
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
    whole: dict[str, list[float]] = {side: [] for side in commands}  # seconds of each run

    def epoch(side: str) -> float:
        began = time.perf_counter()
        ends = _ends([*commands[side], "--epochs", EPOCHS], LOGS[side])
        whole[side].append(time.perf_counter() - began)
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    # Not counted: the first runs compile Python files and fill the caches of the system.
    for side in commands:
        epoch(side)
    once = sum(whole[side].pop() for side in commands)

    def measure() -> dict[str, Any]:
        with folder:
            epochs = in_turns({side: partial(epoch, side) for side in commands}, rounds=ROUNDS)
        version = "import timm, torch; print(timm.__version__, torch.__version__)"
        return {
            "model": options.timm_model,
            "images": counts,
            "batch_size": BATCH,
            "workers": _workers(),
            "timm_and_its_torch": _output([python, "-c", version], cwd=checkout).split(),
            "note": options.timm_note,
            "seconds_of_an_epoch": {side: statistics.median(s) for side, s in epochs.items()},
            "seconds_of_a_run": {side: statistics.median(s) for side, s in whole.items()},
            "epochs_of_a_run": EPOCHS,
            **ratio(epochs["ours"], epochs["timm"]),
        }

    return Plan(once * ROUNDS, measure)


def _ours(images: Path, options: Options) -> list[Argument]:
    """Command of `eps-train`, without the number of epochs."""
    on_gpu = options.device.type == "cuda"
    return [
        *(sys.executable, "-m", "eps_train", "--recipe", "cifar10-110"),
        *("--dataset", f"folder:{images}", "--model", f"timm:{options.timm_model}"),
        *("--batch-size", BATCH, "--lr-schedule", "0:0.01", "--normalization", "channel"),
        *("--epsilon", 2.5, "--epsilon-warmup", EPOCHS),  # gates decide, and stay open
        *("--device", options.device.type, "--precision", "tf32" if on_gpu else "fp32"),
        *("--output", OUTPUT),
    ]


def _theirs(images: Path, options: Options) -> list[Argument]:
    """Arguments of timm's script, without device and number of epochs. It uses TF32 on a GPU."""
    return [
        *("--data-dir", images, "--train-split", "train", "--val-split", "val"),
        *("--model", options.timm_model, "--num-classes", 10, "--input-size", 3, SIZE, SIZE),
        *("--batch-size", BATCH, "--opt", "momentum", "--lr", 0.01, "--warmup-epochs", 0),
        *("--smoothing", 0, "--scale", 1, 1, "--ratio", 1, 1, "--color-jitter", 0, "--hflip", 0.5),
        *("--workers", _workers(), "--channels-last", "--checkpoint-hist", 1),
        *("--output", OUTPUT),
    ]


def _ends(command: list[Argument], log: str) -> list[float]:
    """Run a command in a new folder; returns when each epoch ended, in wall seconds."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as output, tempfile.TemporaryFile("w+") as printed:
        arguments = [output if part is OUTPUT else str(part) for part in command]
        run = subprocess.Popen(arguments, cwd=output, stdout=printed, stderr=subprocess.STDOUT)
        seen = 0
        while run.poll() is None:
            size = sum(path.stat().st_size for path in Path(output).glob(log))
            if size > seen:
                ends.append(time.perf_counter())
            seen = size
            time.sleep(_LOOK)
        if run.returncode or len(ends) != EPOCHS:
            printed.seek(0)
            raise click.ClickException(f"{' '.join(arguments)}\n{printed.read()}")
    return ends


def _output(command: Sequence[Argument], cwd: Path | str | None = None) -> str:
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(arguments)}\n{done.stderr or done.stdout}")
    return done.stdout


def _workers() -> int:
    """Worker processes of timm's loader: its default, or one per core if there are fewer cores."""
    return min(4, os.cpu_count() or 1)


def _write(folder: Path, copies: int) -> dict[str, int]:
    """Write digits as colour PNG files, by part and class; returns how many for each part."""
    digits = dataset.load("digits")
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
