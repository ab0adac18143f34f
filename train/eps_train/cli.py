"""`eps-train`: train an ε-ResNet, or its plain baseline, or both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from eps_train import console, folder_lock, recipes
from eps_train.errors import ConfigError
from eps_train.runfiles import RunFiles

if TYPE_CHECKING:
    import torch

    from eps_train.config import TrainingConfig
    from eps_train.data import Data


def _image_size(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    """Read ``SIZE`` or ``HEIGHTxWIDTH``."""
    if value is None:
        return None
    height, _, width = value.partition("x")
    sizes = (height, width or height)
    if not all(size.isdecimal() and int(size) >= 8 for size in sizes):
        raise click.BadParameter(f"{value}: write SIZE or HEIGHTxWIDTH, in pixels from 8 up")
    return int(sizes[0]), int(sizes[1])


@click.command(context_settings={"show_default": True})
@click.option("--recipe", default="digits", help="Named configuration to start from.")
@click.option(
    "--dataset",
    help="digits, mnist, fashion-mnist, cifar10, cifar100, svhn, or folder:PATH with one folder"
    " of images a class.  [default: the recipe's]",
)
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    help="Folder with the data set's files; digits needs none.  [default: this folder]",
)
@click.option(
    "--image-size",
    metavar="SIZE",
    callback=_image_size,
    help="Pixels, or HEIGHTxWIDTH, that the images are brought to.  [default: as they are]",
)
@click.option("--download", is_flag=True, help="Fetch what is missing of cifar10, cifar100, svhn.")
@click.option(
    "--model",
    help="cifar:DEPTH, imagenet:DEPTH (or DEPTHxWIDTH), torchvision:NAME, timm:NAME, or"
    " package.module:factory.  [default: the recipe's]",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path, dir_okay=False),
    help="State dict (.pt, .pth, .safetensors) to start from instead of random weights.",
)
@click.option(
    "--epsilon",
    type=click.FloatRange(min=0),
    help="Threshold of the gates; 0 trains the plain network.  [default: the recipe's]",
)
@click.option(
    "--epsilon-from",
    type=click.IntRange(min=0),
    metavar="EPOCH",
    help="Epochs to train before the threshold acts: more than 0 for a network whose branches start"
    " at zero.  [default: the recipe's]",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Length.  [default: the recipe's]")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of the run.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Folder for ckpt.pt, last.pt and metrics.jsonl.",
)
@click.option("--resume", is_flag=True, help="Go on from last.pt where a run was stopped.")
@click.option("--force", is_flag=True, help="Start anew over an earlier run's files.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--with-baseline", is_flag=True, help="Then train the plain twin: baseline.pt.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained, and stop.")
@click.option("--list-recipes", is_flag=True, help="List the recipes, and stop.")
@click.option("--show-recipe", is_flag=True, help="Print the configuration as JSON, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def cli(
    recipe: str,
    dataset: str | None,
    data_root: Path | None,
    image_size: tuple[int, int] | None,
    download: bool,
    model: str | None,
    weights: Path | None,
    epsilon: float | None,
    epsilon_from: int | None,
    epochs: int | None,
    seed: int,
    output: Path,
    resume: bool,
    force: bool,
    device: str,
    with_baseline: bool,
    dry_run: bool,
    list_recipes: bool,
    show_recipe: bool,
    as_json: bool,
) -> None:
    """Train an ε-ResNet: blocks whose response stays below epsilon die and are taken out.

    Without arguments it trains depth 110 on scikit-learn's digits into this folder.
    """
    if list_recipes:
        _list_recipes()
        return
    if resume and force:
        raise click.UsageError("--resume and --force contradict each other")
    given: dict[str, Any] = {
        "dataset": dataset,
        "image_size": image_size,
        "model": model,
        "epsilon": epsilon,
        "epsilon_from": epsilon_from,
        "epochs": epochs,
        "seed": seed,
    }
    chosen = replace(
        recipes.recipe(recipe),
        **{name: value for name, value in given.items() if value is not None},
    )
    if with_baseline and chosen.plain:
        raise click.UsageError("--with-baseline needs an epsilon above 0: at 0 both are the same")
    if show_recipe:
        click.echo(json.dumps(chosen.to_dict(), indent=2))
        return
    runs = {RunFiles.of(output): chosen}
    if with_baseline:
        runs[RunFiles.of(output, "baseline")] = chosen.baseline()
    files = [file for run in runs for file in run]
    if not resume and not dry_run:
        console.refuse_existing(files, force)
        _refuse_folders(files)
    if resume and not output.is_dir():
        raise ConfigError(f"--output {output}: no such folder to resume in")

    from eps_train import data, summary

    if dry_run:
        summary.show_plan(chosen, data.outline(chosen.dataset, data_root, chosen.image_size))
        return
    images = data.load(chosen.dataset, data_root, image_size=chosen.image_size, download=download)
    summaries = _train(runs, images, output, _device(device), resume, force, weights)
    summary.show(summaries)
    if as_json:
        console.emit_json({"runs": summaries})


def main() -> NoReturn:
    console.run(cli)


def _list_recipes() -> None:
    for name, make in recipes.RECIPES.items():
        listed = make()
        click.echo(
            f"{name:14} {listed.dataset}, {listed.model}, epsilon {listed.epsilon:g},"
            f" {listed.epochs} epochs"
        )


def _train(
    runs: dict[RunFiles, TrainingConfig],
    images: Data,
    output: Path,
    device: torch.device,
    resume: bool,
    force: bool,
    weights: Path | None,
) -> list[dict[str, Any]]:
    """Train one run after another into the folder `output`; returns their summaries."""
    from eps_train.run import Run

    def prepare(paths: RunFiles) -> Run:
        return Run(runs[paths], images, paths, device=device, resume=resume, weights=weights)

    files = [file for paths in runs for file in paths]
    first, *later = runs
    prepared = prepare(first)
    with folder_lock.held(output, f"--output {output}: another eps-train is writing there"):
        if not resume:
            console.refuse_existing(files, force)  # they may have come into being meanwhile
        if force:
            for file in files:  # only now that nothing more can be refused
                file.unlink(missing_ok=True)
        return [prepared.train(), *(prepare(paths).train() for paths in later)]


def _refuse_folders(files: list[Path]) -> None:
    """Raise ConfigError when a folder lies where a file is to be written."""
    for file in files:
        if file.is_dir():
            raise ConfigError(f"{file}: is a folder; move it away or choose another --output")


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"--device {name}: not a device; write auto, cpu, cuda or cuda:N"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: not supported; write auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here;"
            " use --device cpu"
        )
    return device
