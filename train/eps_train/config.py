"""A training run's complete configuration."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from eps_core.errors import ConfigError
from eps_train.schedule import Steps

CHOICES = {
    "normalization": ("channel", "pixel"),
    "augmentation": ("shift", "svhn", "imagenet"),
    "precision": ("fp32", "tf32", "bf16", "fp16"),
    "gate_scope": ("replica", "global"),
}

_ANY = sys.float_info.max  # below infinity and not a number
_LIMITS = {
    "epsilon_warmup": (0, _ANY),
    "freeze_gates_at": (0, 1),
    "momentum": (0, 0.9999),
    "weight_decay": (0, _ANY),
    "aux_loss_weight": (0, _ANY),
    "seed": (0, 2**32 - 1),
    "shift": (0, 1000),
    "cpu_threads": (0, 4096),
}
_KINDS: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "str": str,
    "None": type(None),
    "Steps": tuple,
    "tuple[int, int]": tuple,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Everything that decides the outcome of a run; saved in its checkpoints.

    Attributes:
        recipe: name of the recipe it came from.
        dataset, model: as `--dataset` and `--model` take them.
        image_size: height and width that the images are brought to; None: as they are.
        epochs, batch_size, seed: the usual; the last batch of an epoch may be smaller.
        epsilon: threshold of every gate, in units of the branch's output; 0 trains the plain
            network, which has no gates at all; None: led to `target_parameters`.
        target_parameters: share of the parameters to keep, 0..1, that epsilon is led to between
            epochs; None: epsilon stays as it is (as in the paper).
        max_accuracy_drop: points of validation accuracy below the run's best from which on an
            epsilon that is led does not rise; None: it may always.
        epsilon_warmup: 0-based epoch from which epsilon acts; before it all gates are open.
        freeze_gates_at: share of the run after which live gates stay open, so that what ships is
            what is trained; 1 never does that (as in the paper).
        patience: K, whole epochs in a row a gate must be closed on every step to be dead.
        live_removal: take dead blocks out of the running network.
        lr_schedule: learning rate from the 0-based epoch on.
        lr_restart: the same, counted from an epoch that lost a block; empty: no restarts.
        final_decay: caps on the learning rate from a share of the run on; the first of them ends
            all restarts.
        momentum, nesterov, weight_decay: of SGD; only weights of convolutions and linear layers
            decay.
        aux_loss_weight: weight of the side head's cross-entropy; 0 for none.
        normalization: `channel` takes mean and deviation per channel, `pixel` the mean image and
            128, as the paper does on small images.
        augmentation: `shift` is random shifts and mirroring; `svhn` and `imagenet` are the paper's
            for these sets.
        shift, flip: pixels of random shift, and whether to mirror at random.
        precision: fp32, tf32 (GPUs alone), bf16 or fp16 (both mixed, the latter with a loss scale).
        compile: whether torch.compile makes the network's kernels.
        sync_batchnorm: batch norm over the batches of all processes (GPUs alone).
        gate_scope: `replica` lets every process judge by its own part of the batch, as in the
            paper; `global` lets all of them judge by the whole.
        cpu_threads: torch's threads on a CPU, 0 for one a core. It is part of the configuration
            because sums depend on it: the same seed gives the same network only at the same count.
    """

    recipe: str
    dataset: str
    image_size: tuple[int, int] | None = None
    model: str
    epochs: int
    batch_size: int
    seed: int = 0
    epsilon: float | None
    target_parameters: float | None = None
    max_accuracy_drop: float | None = None
    epsilon_warmup: int = 0
    freeze_gates_at: float = 1.0
    patience: int = 2
    live_removal: bool = True
    lr_schedule: Steps
    lr_restart: Steps = ()
    final_decay: Steps
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float
    aux_loss_weight: float = 0.1
    normalization: str = "channel"
    augmentation: str = "shift"
    shift: int = 0
    flip: bool = False
    precision: str = "fp32"
    compile: bool = False
    sync_batchnorm: bool = False
    gate_scope: str = "replica"
    cpu_threads: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
        if self.batch_size < 2:
            raise ConfigError("--batch-size must be at least 2: batch norm needs two images")
        if self.patience < 2:
            raise ConfigError("--patience must be at least 2: one closed epoch proves nothing")
        if not self.lr_schedule or self.lr_schedule[0][0] != 0:
            raise ConfigError("--lr-schedule must start at epoch 0")
        for name, (low, high) in _LIMITS.items():
            if not low <= getattr(self, name) <= high:
                limits = f"{low:g} or more" if high == _ANY else f"{low:g} to {high:g}"
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name):g}: must be {limits}"
                )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: is not one of"
                    f" {', '.join(choices)}"
                )
        self._check_threshold()

    def _check_threshold(self) -> None:
        if self.epsilon is None and self.target_parameters is None:
            raise ConfigError("--epsilon is missing; give it, or --target-parameters instead")
        if self.epsilon is not None and self.target_parameters is not None:
            raise ConfigError(
                "--epsilon and --target-parameters contradict each other: the target leads epsilon"
            )
        if self.epsilon is not None and not 0 <= self.epsilon < float("inf"):
            raise ConfigError(f"--epsilon {self.epsilon:g}: must be finite and at least 0")
        if self.target_parameters is not None and not 0 < self.target_parameters < 1:
            raise ConfigError(
                f"--target-parameters {self.target_parameters:g}: must lie between 0 and 1,"
                " the share of the parameters to keep"
            )
        if self.max_accuracy_drop is not None:
            if self.target_parameters is None:
                raise ConfigError("--max-accuracy-drop guards --target-parameters; give that too")
            if not 0 <= self.max_accuracy_drop <= 100:
                raise ConfigError(
                    f"--max-accuracy-drop {self.max_accuracy_drop:g}: must be 0 to 100 points"
                )

    @property
    def plain(self) -> bool:
        """Whether this run trains the plain network, without gates."""
        return self.epsilon == 0

    def baseline(self) -> TrainingConfig:
        """The same run for the plain twin."""
        return replace(self, epsilon=0.0, target_parameters=None, max_accuracy_drop=None)

    def to_dict(self) -> dict[str, Any]:
        return {name: _plain_data(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """Inverse of :meth:`to_dict`. Raises ConfigError for unknown, missing or absurd fields."""
        known = {field.name: str(field.type) for field in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ConfigError(f"unknown configuration field {unknown[0]}")
        arguments = {name: _frozen(value) for name, value in values.items()}
        for name, value in arguments.items():
            kinds = [_KINDS[kind] for kind in known[name].split(" | ")]
            if not any(_is(value, kind) for kind in kinds):
                raise ConfigError(f"{name} is {values[name]!r}, which is no {known[name]}")
        try:
            return cls(**arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"not a training configuration: {error}") from None


def _plain_data(value: Any) -> Any:
    """Tuples, at any depth, as the lists that JSON and the checkpoints hold."""
    return [_plain_data(item) for item in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    """Inverse of :func:`_plain_data`."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    """As `isinstance`, but a truth value is no number, and steps are pairs of numbers."""
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, tuple):
        return kind is tuple and all(_is(i, tuple) or _is(i, (int, float)) for i in value)
    return isinstance(value, kind)


# -- A command-line option for every field of a run's configuration, and `--config` to read one

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
        "--epsilon-warmup",
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
        "--patience",
        {"type": click.IntRange(min=2), "help": "Whole epochs a gate is closed before it is dead."},
    ),
    (
        _THRESHOLD,
        "--freeze-gates-at",
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
        "--lr-schedule",
        {**_STEPS, "help": "Learning rate by epoch, such as 0:0.1,82:0.01."},
    ),
    (
        _OPTIMISER,
        "--lr-restart",
        {**_STEPS, "help": "The same, by epochs since one lost a block; none: no restart."},
    ),
    (
        _OPTIMISER,
        "--final-decay",
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
        "--aux-loss-weight",
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
