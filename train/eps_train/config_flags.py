"""A command-line option for every field of a run's configuration, and `--config` to read one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from eps_train.config import CHOICES, TrainingConfig
from eps_train.errors import ConfigError
from eps_train.schedule import Steps

_Function = TypeVar("_Function", bound=Callable[..., Any])


def image_size(text: str) -> tuple[int, int]:
    """Read `SIZE` or `HEIGHTxWIDTH`, in pixels. Raises click.BadParameter."""
    height, _, width = text.partition("x")
    sizes = (height, width or height)
    if not all(size.isdecimal() and int(size) >= 8 for size in sizes):
        raise click.BadParameter(f"{text}: write SIZE or HEIGHTxWIDTH, in pixels from 8 up")
    return int(sizes[0]), int(sizes[1])


def steps(text: str) -> Steps:
    """Read a step function `FROM:VALUE,FROM:VALUE...`; `none` is the empty one.

    Raises click.BadParameter.
    """
    if text == "none":
        return ()
    try:
        pairs = [step.split(":") for step in text.split(",")]
        found = tuple((float(start), float(value)) for start, value in pairs)
    except ValueError:
        raise click.BadParameter(f"{text}: write FROM:VALUE,FROM:VALUE... or none") from None
    starts = [start for start, _ in found]
    if starts != sorted(set(starts)) or starts[0] < 0:
        raise click.BadParameter(f"{text}: the starts must ascend from 0 or above")
    if any(not 0 <= value < float("inf") for _, value in found):
        raise click.BadParameter(f"{text}: the values must be finite and not negative")
    return found


_STEPS = {"type": steps, "metavar": "STEPS"}
_POSITIVE = click.IntRange(min=1)
_COUNT = click.IntRange(min=0)
_SHARE = click.FloatRange(0, 1)
_NOT_NEGATIVE = click.FloatRange(min=0)

_RUN = "The run (each of these overrides the recipe)"
_THRESHOLD = "Threshold"
_OPTIMISER = "Optimiser"
_INPUT = "Input"
_MACHINE = "Machine"

# In the order of the help text: section, option, what click is told of it.
_OPTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        _RUN,
        "--dataset",
        {
            "help": "digits, mnist, fashion-mnist, cifar10, cifar100, svhn, imagenet, or"
            " folder:PATH with one folder of images a class."
        },
    ),
    (
        _RUN,
        "--image-size",
        {
            "type": image_size,
            "metavar": "SIZE",
            "help": "Pixels, or HEIGHTxWIDTH, that images are brought to.",
        },
    ),
    (
        _RUN,
        "--model",
        {
            "help": "cifar:DEPTH, imagenet:DEPTH (or DEPTHxWIDTH), torchvision:NAME,"
            " timm:NAME[,ARGUMENT=VALUE], or package.module:factory."
        },
    ),
    (_RUN, "--epochs", {"type": _POSITIVE, "help": "Length of the run."}),
    (
        _RUN,
        "--batch-size",
        {"type": _POSITIVE, "help": "Images a step, of all processes together."},
    ),
    (_RUN, "--seed", {"type": click.IntRange(0, 2**32 - 1), "help": "Seed of the run."}),
    (
        _THRESHOLD,
        "--epsilon",
        {"type": _NOT_NEGATIVE, "help": "Threshold of the gates; 0 trains the plain network."},
    ),
    (
        _THRESHOLD,
        "--epsilon-from",
        {
            "type": _COUNT,
            "metavar": "EPOCH",
            "help": "Epochs to train before the threshold acts: more than 0 for a network whose"
            " branches start at zero.",
        },
    ),
    (
        _THRESHOLD,
        "--target-parameters",
        {
            "type": click.FloatRange(0, 1, min_open=True, max_open=True),
            "metavar": "SHARE",
            "help": "Lead the threshold until this share of the parameters is left.",
        },
    ),
    (
        _THRESHOLD,
        "--max-accuracy-drop",
        {
            "type": click.FloatRange(0, 100),
            "metavar": "POINTS",
            "help": "With --target-parameters: wait while validation accuracy is further than this"
            " below its best.",
        },
    ),
    (
        _THRESHOLD,
        "--closed-epochs",
        {"type": click.IntRange(min=2), "help": "Whole epochs a gate is closed before it is dead."},
    ),
    (
        _THRESHOLD,
        "--settle-at",
        {"type": _SHARE, "help": "Share of the run after which live gates stay open."},
    ),
    (
        _THRESHOLD,
        "--live-removal/--no-live-removal",
        {"help": "Take dead blocks out of the running network."},
    ),
    (
        _THRESHOLD,
        "--gate-scope",
        {
            "type": click.Choice(CHOICES["gate_scope"]),
            "help": "With several processes: judge by each one's part of a batch, or the whole.",
        },
    ),
    (
        _OPTIMISER,
        "--rates",
        {**_STEPS, "help": "Learning rate by epoch, such as 0:0.1,82:0.01."},
    ),
    (
        _OPTIMISER,
        "--restart",
        {**_STEPS, "help": "The same, by epochs since one lost a block; none: no restart."},
    ),
    (
        _OPTIMISER,
        "--descent",
        {**_STEPS, "help": "Caps on the rate, by share of the run, such as 0.6:0.01; none."},
    ),
    (_OPTIMISER, "--momentum", {"type": click.FloatRange(0, 1, max_open=True), "help": "Of SGD."}),
    (_OPTIMISER, "--nesterov/--no-nesterov", {"help": "Nesterov's momentum."}),
    (
        _OPTIMISER,
        "--weight-decay",
        {"type": _NOT_NEGATIVE, "help": "Of convolutions and linear layers."},
    ),
    (
        _OPTIMISER,
        "--side-weight",
        {"type": _NOT_NEGATIVE, "help": "Weight of the side head's loss; 0: no side head."},
    ),
    (
        _INPUT,
        "--normalization",
        {
            "type": click.Choice(CHOICES["normalization"]),
            "help": "By mean and deviation of each channel, or the mean image and 128.",
        },
    ),
    (
        _INPUT,
        "--augmentation",
        {
            "type": click.Choice(CHOICES["augmentation"]),
            "help": "Random shifts and mirroring, or what the paper does to SVHN or ImageNet.",
        },
    ),
    (_INPUT, "--shift", {"type": _COUNT, "help": "Pixels of random shift."}),
    (_INPUT, "--flip/--no-flip", {"help": "Mirror at random."}),
    (
        _MACHINE,
        "--precision",
        {
            "type": click.Choice(CHOICES["precision"]),
            "help": "fp32 (TF32 off), tf32 (GPUs), bf16 or fp16 (both mixed).",
        },
    ),
    (_MACHINE, "--compile/--no-compile", {"help": "Train through torch.compile."}),
    (
        _MACHINE,
        "--sync-batchnorm/--no-sync-batchnorm",
        {"help": "Batch norm over the batches of all processes (GPUs)."},
    ),
    (_MACHINE, "--cpu-threads", {"type": _COUNT, "help": "torch's threads on a CPU; 0: all."}),
)


class SectionedOption(click.Option):
    """An option that knows its section of the help text."""

    def __init__(self, *args: Any, section: str = "Command", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help lists its options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = getattr(parameter, "section", "Command")
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def config_options(function: _Function) -> _Function:
    """Decorate a command with an option for every field; those not given are None."""
    for section, option, settings in reversed(_OPTIONS):
        decorate = click.option(
            option, cls=SectionedOption, section=section, default=None, **settings
        )
        function = decorate(function)
    return function


def read(path: Path) -> TrainingConfig:
    """Read a configuration that `--show-recipe` printed or a run wrote.

    Raises ConfigError that names the file when it is not one.
    """
    try:
        # As bytes: json finds UTF-8 with a byte order mark, and UTF-16, which PowerShell writes.
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"--config {path}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"--config {path}: not a JSON object of configuration fields")
    try:
        return TrainingConfig.from_dict(fields)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None


def override(base: TrainingConfig, given: Mapping[str, Any]) -> TrainingConfig:
    """`base` with the options that were given (those that are not None).

    A threshold takes the place of a target, and the other way round. Raises ConfigError when the
    result makes no sense.
    """
    fields = {name: value for name, value in given.items() if value is not None}
    if "target_parameters" in fields:
        fields.setdefault("epsilon", None)
    elif "epsilon" in fields:
        fields["target_parameters"] = None
        fields.setdefault("max_accuracy_drop", None)
    return replace(base, **fields)
