"""Folders benchmark: settings of a training on few photographs, one changed at a time.

The defaults of the recipes `images` (from scratch) and `finetune` (from --weights) come from it.
For each number of images, a folder is made from CIFAR-10: as many training images of each class,
drawn by a fixed seed, and 4,000 test images. Every run is a command of the product in a folder of
its own under --work; a benchmark that was stopped goes on. Gates are off: the settings are those of
the optimizer and of the images. The last line printed is one JSON object.

    python benchmarks/folders.py --data-root DATA --images 500,2000 --seeds 0,1
    python benchmarks/folders.py --data-root DATA --images 500 --weights WEIGHTS \\
        --model timm:resnet26d,base_width=16 --image-size 64
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from _commands import Step, run
from PIL import Image

from eps_train.data import dataset
from eps_train.data.images import Part
from eps_train.training.checkpoint import Checkpoint

TEST_IMAGES = 4000

# Each setting is the first one with these options changed.
SCRATCH = {
    "base": "--epochs=40 --batch-size=64 --lr-schedule=cosine:0.1 --weight-decay=5e-4 --shift=4"
    " --normalization=channel --head-epochs=0",
    "digits recipe": "--lr-schedule=0:0.1 --final-decay=0.6:0.01,0.8:0.001 --weight-decay=5e-3"
    " --shift=1 --no-flip --aux-loss-weight=0.1",
    "step schedule": "--lr-schedule=0:0.1 --final-decay=0.6:0.01,0.8:0.001",
    "rate 0.03": "--lr-schedule=cosine:0.03",
    "rate 0.3, warm-up": "--lr-schedule=cosine:0.3 --lr-warmup=4",
    "batch 32": "--batch-size=32",
    "batch 16": "--batch-size=16",
    "120 epochs": "--epochs=120",
    "decay 2e-3": "--weight-decay=2e-3",
    "decay 5e-3": "--weight-decay=5e-3",
    "decay 5e-3, batch 32": "--weight-decay=5e-3 --batch-size=32",
    "decay 5e-3, batch 32, 120 epochs": "--weight-decay=5e-3 --batch-size=32 --epochs=120",
    "AdamW": "--optimizer=adamw --lr-schedule=cosine:0.003 --weight-decay=0.05 --lr-warmup=2",
    "label smoothing": "--label-smoothing=0.1",
    "TrivialAugment": "--augmentation=trivial",
    "random erasing": "--random-erasing=0.25",
    "MixUp": "--mixup=0.2",
    "CutMix": "--cutmix=1.0",
    "EMA": "--ema=0.99",
}
FINETUNE = {
    "base": "--epochs=20 --batch-size=64 --lr-schedule=cosine:0.02 --weight-decay=1e-4"
    " --head-epochs=1",
    "shift": "--shift=4",
    "no head epoch": "--head-epochs=0",
    "rate 0.005": "--lr-schedule=cosine:0.005",
    "rate 0.05": "--lr-schedule=cosine:0.05",
    "rate 0.1": "--lr-schedule=cosine:0.1",
    "decay 5e-4": "--weight-decay=5e-4",
    "decay 2e-3": "--weight-decay=2e-3",
    "AdamW": "--optimizer=adamw --lr-schedule=cosine:0.001 --weight-decay=0.05",
    "label smoothing": "--label-smoothing=0.1",
    "TrivialAugment": "--augmentation=trivial",
    "MixUp": "--mixup=0.2",
    "CutMix": "--cutmix=1.0",
    "EMA": "--ema=0.99",
}


def make_folder(source: Part, classes: Sequence[str], folder: Path, count: int) -> None:
    """Write `count` images of `source`, equally many of each class, as PNG files."""
    generator = torch.Generator().manual_seed(count)
    for label, name in enumerate(classes):
        indices = (source.labels == label).nonzero().flatten()
        order = torch.randperm(len(indices), generator=generator)
        chosen = indices[order[: count // len(classes)]]
        (folder / name).mkdir(parents=True)
        for index, image in zip(chosen.tolist(), source[chosen].images, strict=True):
            pixels = image.permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / name / f"{index:05d}.png")


@click.command()
@click.option("--data-root", type=click.Path(path_type=Path), required=True, help="CIFAR-10.")
@click.option("--images", default="500,2000", show_default=True)
@click.option("--seeds", default="0,1", show_default=True)
@click.option("--model", default="cifar:20x8", show_default=True)
@click.option("--image-size", type=int, default=32, show_default=True)
@click.option("--weights", type=click.Path(path_type=Path, exists=True))
@click.option("--settings", help="Names of settings, separated by ;  [default: all]")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/folders"))
def main(
    data_root: Path,
    images: str,
    seeds: str,
    model: str,
    image_size: int,
    weights: Path | None,
    settings: str | None,
    work: Path,
) -> None:
    """Train each setting and compare it with the first."""
    options = FINETUNE if weights else SCRATCH
    chosen = settings.split(";") if settings else list(options)
    rows = []
    for count in map(int, images.split(",")):
        folder = work.resolve() / f"cifar10-{count}"
        if not folder.exists():
            data = dataset.load("cifar10", data_root)
            make_folder(data.train, data.identity.classes, folder / "train", count)
            make_folder(data.test, data.identity.classes, folder / "test", TEST_IMAGES)
        for seed in map(int, seeds.split(",")):
            for name in chosen:
                words = [
                    "--recipe=finetune",
                    f"--dataset=folder:{folder}",
                    f"--model={model}",
                    f"--image-size={image_size}",
                    "--epsilon=0",
                    f"--seed={seed}",
                ]
                words += [f"--weights={weights.resolve()}"] if weights else []
                words += options["base"].split()
                words += [] if name == "base" else options[name].split()
                step = Step(words=("eps-train", *words))
                trained = Checkpoint.load(run(step, work, "--device", "cpu"))
                accuracy = trained.metrics["test"]["accuracy"]
                rows.append({"images": count, "seed": seed, "setting": name, "accuracy": accuracy})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    machine = {"cpus": os.cpu_count(), "threads": 1, "torch": str(torch.__version__), "gpu": None}
    setting = {"model": model, "image_size": image_size, "pretrained": weights is not None}
    settings_used = {name: options[name] for name in chosen}
    found = {"machine": machine, **setting, "settings": settings_used, "rows": rows}
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), **found}))


if __name__ == "__main__":
    main()
