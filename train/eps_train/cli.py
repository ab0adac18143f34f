"""`eps-train`: train an ε-ResNet, or its plain baseline, or both."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from eps_core import cli as console
from eps_core.errors import ConfigError, DamagedImages
from eps_core.files import held
from eps_train import config, recipes
from eps_train.config import SectionedCommand, config_options
from eps_train.training.paths import RunPaths

if TYPE_CHECKING:
    from eps_train.config import TrainingConfig
    from eps_train.data.dataset import Data, DataIdentity
    from eps_train.training.distributed import Group
    from eps_train.training.run import Run


@click.command(cls=SectionedCommand, context_settings={"show_default": True})
@click.option("--recipe", help="Named configuration to start from.  [default: digits]")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The same from a file: what --show-recipe printed, or a run's config.json.",
)
@config_options
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    help="Folder with the data set's files; digits needs none.  [default: this folder]",
)
@click.option("--download", is_flag=True, help="Fetch the files that are missing, where possible.")
@click.option("--skip-damaged", is_flag=True, help="Train without the images that cannot be read.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path, dir_okay=False),
    help="State dict (.pt, .pth, .safetensors) to start from instead of random weights.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Folder for ckpt.pt, last.pt and metrics.jsonl.",
)
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    default=0,
    help="Keep the last N epochs' checkpoints too: epoch-0012.pt and so on.",
)
@click.option("--tensorboard", is_flag=True, help="Write event files below tensorboard/.")
@click.option("--resume", is_flag=True, help="Go on from last.pt where a run was stopped.")
@click.option("--force", is_flag=True, help="Start anew over an earlier run's files.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--cuda-graph",
    type=click.Choice(("auto", "on", "off")),
    default="auto",
    help="Replay the training step from a CUDA graph; auto: on one GPU, without --compile or fp16.",
)
@click.option("--with-baseline", is_flag=True, help="Then train the plain twin: baseline.pt.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained, and stop.")
@click.option("--list-recipes", is_flag=True, help="List the recipes, and stop.")
@click.option("--show-recipe", is_flag=True, help="Print the configuration as JSON, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def cli(
    recipe: str | None,
    config_file: Path | None,
    data_root: Path | None,
    download: bool,
    skip_damaged: bool,
    weights: Path | None,
    output: Path,
    keep: int,
    tensorboard: bool,
    resume: bool,
    force: bool,
    device: str,
    cuda_graph: str,
    with_baseline: bool,
    dry_run: bool,
    list_recipes: bool,
    show_recipe: bool,
    as_json: bool,
    **fields: Any,
) -> None:
    """Train an ε-ResNet: blocks whose response stays below epsilon die and are taken out.

    Without arguments it trains depth 110 on scikit-learn's digits into this folder.
    """
    if list_recipes:
        _list_recipes()
        return
    if console.restarts():
        resume, force = True, False  # what is there, the processes before have written
    if resume and force:
        raise click.UsageError("--resume and --force contradict each other")
    if recipe and config_file:
        raise click.UsageError("--recipe and --config contradict each other")
    base = config.read(config_file) if config_file else recipes.recipe(recipe or "digits")
    chosen = config.override(base, fields)
    if with_baseline and chosen.plain:
        raise click.UsageError("--with-baseline needs an epsilon above 0: at 0 both are the same")
    if show_recipe:
        click.echo(json.dumps(chosen.to_dict(), indent=2))
        return
    runs = {RunPaths.of(output): chosen}
    if with_baseline:
        runs[RunPaths.of(output, "baseline")] = chosen.baseline()
    files = [file for run in runs for file in run.all()]
    console.refuse_missing(weights)
    if not resume and not dry_run:
        console.refuse_existing(files, force)
        _refuse_folders(files)
    if resume and not output.is_dir() and not console.restarts():
        raise ConfigError(f"--output {output}: no such folder to resume in")

    from eps_train.data import dataset
    from eps_train.training import distributed, forward
    from eps_train.training import run as summary
    from eps_train.training.run import Run

    load = partial(
        dataset.load,
        chosen.dataset,
        data_root,
        image_size=chosen.image_size,
        normalization=chosen.normalization,
        skip_damaged=skip_damaged,
    )
    if dry_run:
        known = chosen.dataset in dataset.DATASETS
        outline = (
            dataset.outline(chosen.dataset, data_root, chosen.image_size)
            if known
            else _told(load).identity.outline
        )
        summary.show_plan(chosen, outline)
        return
    place = forward.choose(device)
    with distributed.joined(place) as group:
        like = _earlier_data(runs, chosen) if resume else None
        room = min(
            group.gather(dataset.room_for_images())
        )  # before one of them has taken its share
        images = group.first(
            lambda: _told(
                partial(load, download=download, like=like, room=room, check=like is None)
            )
        )
        run = partial(
            Run,
            data=images,
            device=place,
            resume=resume,
            weights=weights,
            keep=keep,
            tensorboard=tensorboard,
            group=group,
            cuda_graph=cuda_graph,
        )
        summaries = _train(runs, run, output, group, resume, force)
    summary.show(summaries)
    if as_json:
        console.emit_json({"runs": summaries})


def main() -> NoReturn:
    console.run(cli)


def _list_recipes() -> None:
    for name, make in recipes.RECIPES.items():
        listed = make()
        assert listed.epsilon is not None  # no recipe leads it
        click.echo(
            f"{name:14} {listed.dataset}, {listed.model}, epsilon {listed.epsilon:g},"
            f" {listed.epochs} epochs"
        )


def _train(
    runs: dict[RunPaths, TrainingConfig],
    run: Callable[..., Run],
    output: Path,
    group: Group,
    resume: bool,
    force: bool,
) -> list[dict[str, Any]]:
    """Train one run after another into the folder `output`; returns their summaries."""

    def prepare(files: RunPaths) -> Run:
        return run(runs[files], files=files)

    def make_way() -> None:
        if not resume:
            console.refuse_existing(files, force)  # they may have come into being meanwhile
        if force:
            for file in files:  # only now that nothing more can be refused
                file.unlink(missing_ok=True)

    files = [file for paths in runs for file in paths.all()]
    first, *later = runs
    prepared = prepare(first)
    busy = f"--output {output}: another eps-train is writing there"
    with group.led(held(output, busy)):
        group.lead(make_way)
        return [prepared.train(), *(prepare(paths).train() for paths in later)]


def _told(load: Callable[[], Data]) -> Data:
    """What `load` loads, described; all images that are damaged are listed before it fails."""
    log = console.log()
    try:
        images = load()
    except DamagedImages as error:
        for problem in error.problems.values():
            log.print(problem)
        raise
    log.print(images.describe())
    if images.warning:
        log.print(f"warning: {images.warning}")
    return images


def _earlier_data(
    runs: dict[RunPaths, TrainingConfig], chosen: TrainingConfig
) -> DataIdentity | None:
    """The data of the run that is to be resumed; None where there is none, or of another set."""
    from eps_train.training.checkpoint import Checkpoint

    for files in runs:
        if files.last.exists():
            identity = Checkpoint.load(files.last).data
            return identity if identity.may_be(chosen.dataset) else None
    return None


def _refuse_folders(files: list[Path]) -> None:
    """Raise ConfigError when a folder lies where a file is to be written."""
    for file in files:
        if file.is_dir():
            raise ConfigError(f"{file}: is a folder; move it away or choose another --output")
