"""`eps-train`: train an ε-ResNet, its baseline, or both."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from eps_core import cli as console
from eps_core.errors import ConfigError, DamagedImages, FileFormatError
from eps_core.files import held
from eps_train import config, recipes
from eps_train.config import SectionedCommand, config_options
from eps_train.training.paths import RunPaths

if TYPE_CHECKING:
    from eps_train.config import TrainingConfig
    from eps_train.data.dataset import Data, DataIdentity, Statistics
    from eps_train.training.distributed import Group

Runs = dict[RunPaths, "TrainingConfig"]
"""What to train, one run after another, by the files that each writes."""


@click.command(cls=SectionedCommand, context_settings={"show_default": True})
@click.option(
    "--recipe",
    help="Named configuration to start from.  [default: for images in folder:, csv: and hf: images,"
    " or finetune if there are weights; else digits]",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Configuration file to start from: the output of --show-recipe, or a run's config.json.",
)
@config_options
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    help="Folder of the data set's files; digits needs none.  [default: current folder]",
)
@click.option("--download", is_flag=True, help="Download missing files where possible.")
@click.option("--skip-damaged", is_flag=True, help="Skip images that cannot be read.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path, dir_okay=False),
    help="State dict (.pt, .pth, .safetensors) to start from instead of random weights.",
)
@click.option(
    "--pretrained",
    is_flag=True,
    help="Start from the weights that torchvision or timm publishes; downloaded once.",
)
@click.option(
    "--teacher",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Checkpoint of eps-train to distil from, such as baseline.pt; not for --with-baseline.",
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
    help="Also keep the checkpoints of the last N epochs: epoch-0012.pt and so on.",
)
@click.option(
    "--tracker",
    "trackers",
    multiple=True,
    metavar="NAME",
    help="Record every epoch with tensorboard, mlflow or wandb; may be repeated.",
)
@click.option("--resume", is_flag=True, help="Resume a stopped run from last.pt.")
@click.option("--force", is_flag=True, help="Overwrite the files of an earlier run.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--cuda-graph",
    type=click.Choice(("auto", "on", "off")),
    default="auto",
    help="Replay the training step from a CUDA graph; auto: on one GPU, without --compile or fp16.",
)
@click.option("--with-baseline", is_flag=True, help="Then train the baseline too: baseline.pt.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained and exit.")
@click.option("--list-recipes", is_flag=True, help="List the recipes and exit.")
@click.option("--show-recipe", is_flag=True, help="Print the configuration as JSON and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def cli(
    recipe: str | None,
    config_file: Path | None,
    data_root: Path | None,
    download: bool,
    skip_damaged: bool,
    weights: Path | None,
    pretrained: bool,
    teacher: Path | None,
    output: Path,
    keep: int,
    trackers: tuple[str, ...],
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
    """Train an ε-ResNet and remove residual blocks whose response stays below epsilon.

    Without arguments, trains depth 110 on scikit-learn's digits into the current folder.
    """
    if list_recipes:
        click.echo("\n".join(recipes.describe()))
        return
    if console.restarts():  # torchrun started the processes again: go on with what they wrote
        resume, force = True, False
    if resume and force:
        raise click.UsageError("--resume and --force contradict each other")
    if recipe and config_file:
        raise click.UsageError("--recipe and --config contradict each other")
    if weights and pretrained:
        raise click.UsageError("--weights and --pretrained contradict each other")
    if teacher and fields["self_distillation"]:
        raise click.UsageError("--teacher and --self-distillation contradict each other")
    if teacher:
        fields["self_distillation"] = False
    if pretrained and fields["normalization"] is None:
        fields["normalization"] = "pretrained"
    auto_batch = fields["batch_size"] == config.AUTO
    if auto_batch:
        fields["batch_size"] = None
    if config_file:
        base = config.read(config_file)
    else:
        weighted = pretrained or weights is not None
        recipe = recipe or (_resumed_recipe(output) if resume else None)
        base = recipes.recipe(recipe or recipes.default(fields["dataset"], pretrained=weighted))
    chosen = config.override(base, fields)
    if with_baseline and chosen.plain:
        raise click.UsageError("--with-baseline needs an epsilon above 0: at 0 both are the same")
    if show_recipe:
        click.echo(json.dumps(chosen.to_dict(), indent=2))
        return
    runs = {RunPaths.of(output): chosen}
    if with_baseline:
        runs[RunPaths.of(output, "baseline")] = chosen.baseline()
    console.refuse_missing(weights, teacher)
    if not dry_run:
        _check_output(output, runs, resume=resume, force=force)

    from eps_train.data import dataset
    from eps_train.models import registry
    from eps_train.training import forward
    from eps_train.training import run as summary

    if pretrained:
        registry.pretrained(chosen.model)  # refused now rather than after the images were read
    load = partial(
        dataset.load,
        chosen.dataset,
        data_root,
        image_size=chosen.image_size,
        fit=chosen.fit,
        normalization=chosen.normalization,
        statistics=_statistics(chosen, weights),
        skip_damaged=skip_damaged,
    )
    if dry_run:
        outline = (
            dataset.outline(chosen.dataset, chosen.image_size)
            if chosen.dataset in dataset.DATASETS
            else _describe(load).identity.outline
        )
        summary.show_plan(chosen, outline, forward.choose(device))
        if auto_batch:
            console.log().print("--batch-size auto: tried on the device when the run begins")
        return
    summaries = _train(
        runs,
        partial(load, download=download),
        output,
        device,
        force=force,
        resume=resume,
        weights=weights,
        pretrained=pretrained,
        teacher=teacher,
        auto_batch=auto_batch,
        keep=keep,
        trackers=trackers,
        cuda_graph=cuda_graph,
    )
    summary.show(summaries)
    if as_json:
        console.emit_json({"runs": summaries})


def main() -> NoReturn:
    console.run(cli)


def _resumed_recipe(output: Path) -> str | None:
    """The recipe of the run that is to be resumed; None where there is none, or not one of ours."""
    files = RunPaths.of(output)
    with suppress(ConfigError):
        if files.last.exists() and (recipe := config.read(files.config).recipe) in recipes.RECIPES:
            return recipe
    return None


def _check_output(output: Path, runs: Runs, *, resume: bool, force: bool) -> None:
    """Raise ConfigError when the runs cannot write their files, or cannot be resumed from them."""
    if resume:
        if not output.is_dir() and not console.restarts():
            raise ConfigError(f"--output {output}: no such folder to resume in")
        return
    files = [file for paths in runs for file in paths.all()]
    console.refuse_existing(files, force)
    for file in files:
        if file.is_dir():
            raise ConfigError(f"{file}: is a folder; move it away or choose another --output")


def _statistics(chosen: TrainingConfig, weights: Path | None) -> Statistics | None:
    """Mean and std of the images that the weights were trained on, if the run normalizes by them.

    A checkpoint of eps-train has its own, and torchvision and timm name theirs; otherwise those of
    ImageNet are taken.
    """
    if chosen.normalization != "pretrained":
        return None
    from eps_train.models import registry
    from eps_train.training.checkpoint import Checkpoint

    if weights is not None:
        with suppress(FileFormatError):
            identity = Checkpoint.load(weights).data
            return identity.mean, identity.std
    mean, std = registry.normalization(chosen.model)
    return tuple(255 * value for value in mean), tuple(255 * value for value in std)


def _train(
    runs: Runs,
    load: Callable[..., Data],
    output: Path,
    device: str,
    *,
    force: bool,
    resume: bool,
    teacher: Path | None,
    auto_batch: bool,
    **options: Any,
) -> list[dict[str, Any]]:
    """Train one run after another into the folder `output`; returns their summaries.

    The first one follows `teacher`. With `auto_batch`, all take the largest batch that the first
    one has memory for, or had when it was begun. `options` are those of
    :class:`~eps_train.training.run.Run`.
    """
    from eps_train.data import dataset
    from eps_train.training import distributed, forward
    from eps_train.training.probe import largest_batch
    from eps_train.training.run import Run
    from eps_train.training.trainer import network_spec

    def clear_output() -> None:
        if not resume:
            console.refuse_existing(files, force)  # they may have come into being meanwhile
        if force:
            for file in files:  # only now that nothing more can be refused
                file.unlink(missing_ok=True)

    files = [file for paths in runs for file in paths.all()]
    first = next(iter(runs.values()))
    place = forward.choose(device)
    with distributed.joined(place) as group:
        like, size = _resumed(runs) if resume else (None, None)
        # Gathered before one of the processes has taken its share.
        room = min(group.gather(dataset.room_for_images()))
        data = group.first(
            lambda: _describe(partial(load, like=like, room=room, check=like is None))
        )
        console.log().print(f"recipe: {first.recipe}")
        if auto_batch:
            if group.world is not None:
                raise ConfigError(
                    "--batch-size auto: not with several processes; give the number of images"
                )
            if size is None:
                spec = network_spec(first, data.identity.outline)
                size = largest_batch(first, spec, data, place)
            console.log().print(f"batch size: {size}")
            runs = {files: replace(chosen, batch_size=size) for files, chosen in runs.items()}
        prepare = partial(Run, data=data, device=place, resume=resume, group=group, **options)
        (paths, chosen), *later = runs.items()
        prepared = prepare(config=chosen, files=paths, teacher=teacher)
        busy = f"--output {output}: another eps-train is writing there"
        with group.led(held(output, busy)):
            _refuse_separate(output, group)
            group.lead(clear_output)
            return [
                prepared.train(),
                *(prepare(config=chosen, files=paths).train() for paths, chosen in later),
            ]


def _refuse_separate(output: Path, group: Group) -> None:
    """Raise ConfigError when the nodes have a folder `output` each: process 0 writes, all read."""

    def mark() -> str:
        handle, path = tempfile.mkstemp(prefix=".eps-train-", dir=output)
        os.close(handle)
        return Path(path).name

    if group.world is None:
        return
    name = group.lead(mark)
    seen = group.gather(output.is_dir() and name in os.listdir(output))
    group.lead(lambda: (output / name).unlink())
    if not all(seen):
        group.fail(
            ConfigError(
                f"--output {output}: is another folder on some of the nodes; give one on a file"
                " system that all nodes share"
            )
        )


def _describe(load: Callable[[], Data]) -> Data:
    """Load a data set and log its description, or every image that cannot be read."""
    log = console.log()
    try:
        data = load()
    except DamagedImages as error:
        for problem in error.problems.values():
            log.print(problem)
        raise
    log.print(data.describe())
    if data.warning:
        log.print(f"warning: {data.warning}")
    return data


def _resumed(runs: Runs) -> tuple[DataIdentity | None, int | None]:
    """Data, unless it is of another set, and batch size of the run to resume, if there is one."""
    from eps_train.training.checkpoint import Checkpoint

    for files, chosen in runs.items():
        if files.last.exists():
            last = Checkpoint.load(files.last)
            like = last.data if last.data.may_be(chosen.dataset) else None
            return like, last.config.get("batch_size")
    return None, None
