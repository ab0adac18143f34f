"""The configuration of a training run.

Each field of :class:`TrainingConfig` is declared once: its type, default, help text, limits and
section. The options of `eps-train`, the checks and `--show-recipe` follow from that declaration.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from eps_core.errors import ConfigError
from eps_core.preprocessing import FITS
from eps_train.gating.targets import TARGETS, Target
from eps_train.schedule import CosineDecay, LrSchedule, Steps

T = TypeVar("T")


def plain_data(record: Any) -> dict[str, Any]:
    """A dataclass as JSON and checkpoints hold it: dicts, lists, strings and numbers."""

    def lists(value: Any) -> Any:  # msgspec leaves tuples as they are, and its JSON has no infinity
        if isinstance(value, dict):
            return {name: lists(item) for name, item in value.items()}
        return [lists(item) for item in value] if isinstance(value, (list, tuple)) else value

    plain: dict[str, Any] = lists(msgspec.to_builtins(record))
    return plain


def from_plain_data(values: Any, kind: type[T]) -> T:
    """Inverse of :func:`plain_data`. Raises ConfigError that names the first bad field."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$.")
        name = f"{place.rstrip('`')}: " if place else ""
        raise ConfigError(f"{name}{problem[0].lower()}{problem[1:]}") from None


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of a number; `high` None: any finite one. `open` excludes both ends.

    `unit` stands for the number in `--help`.
    """

    low: float
    high: float | None = None
    open: bool = False
    unit: str | None = None

    def __contains__(self, value: float) -> bool:
        high = sys.float_info.max if self.high is None else self.high
        return self.low < value < high if self.open else self.low <= value <= high

    def __str__(self) -> str:
        if self.high is None:
            return f"finite and {'above' if self.open else 'at least'} {self.low}"
        return f"{self.low} to {self.high}" + (", both excluded" if self.open else "")


def _option(
    section: str,
    help: str,
    values: Bounds | tuple[str, ...] | None = None,
    *,
    default: Any = MISSING,
) -> Any:
    """A field, with the section, help text and permitted values of its option.

    Typed Any, so that a type checker takes it for the value of the field (`noqa: RUF009` where the
    linter does not know the field's type as immutable).
    """
    return field(default=default, metadata={"section": section, "help": help, "values": values})


_run = partial(_option, "Training run (overrides the recipe)")
_pruning = partial(_option, "Pruning")
_optimizer = partial(_option, "Optimizer")
_input = partial(_option, "Input")
_hardware = partial(_option, "Hardware")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Everything that decides the outcome of a run; saved in its checkpoints.

    `recipe` is the name of the recipe that the configuration came from; the metadata of every other
    field holds its description. Raises ConfigError for values outside their limits.
    """

    recipe: str
    dataset: str = _run(
        "digits, mnist, fashion-mnist, cifar10, cifar100, svhn, imagenet, folder:PATH with one"
        " folder of images per class, csv:PATH, a file with the columns path and label, or hf:PATH"
        " or hf:NAME, a data set of Hugging Face."
    )
    image_size: tuple[int, int] | None = _run(
        "Resize images to SIZE or HEIGHTxWIDTH, in pixels.", default=None
    )
    fit: str = _run(
        "Images of another aspect ratio: crop at the center, or letterbox: show the whole image on"
        " gray.",
        FITS,
        default="crop",
    )
    model: str = _run(
        "cifar:DEPTH, imagenet:DEPTH (or DEPTHxWIDTH), torchvision:NAME,"
        " timm:NAME[,ARGUMENT=VALUE], or package.module:factory."
    )
    epochs: int = _run("Number of epochs; 0 evaluates the weights as they are.", Bounds(0))
    batch_size: int = _run(
        "Images per step, over all processes; auto: the largest power of two that fits in the"
        " memory of the GPU, with at least 64 steps in an epoch.",
        Bounds(2, unit="NUMBER|auto"),
    )
    early_stopping: int = _run(
        "Stop after so many epochs without a better validation accuracy, though not before a"
        " target is met; 0: never.",
        Bounds(0, unit="EPOCHS"),
        default=0,
    )
    head_epochs: int = _run(
        "Of these epochs, train only the last layer in so many at the start; for --pretrained and"
        " --weights.",
        Bounds(0, unit="EPOCHS"),
        default=0,
    )
    seed: int = _run("Random seed.", Bounds(0, 2**32 - 1), default=0)

    epsilon: float | None = _pruning(
        "Threshold of all gates, in units of the branch's output; 0 trains the baseline without"
        " gates.",
        Bounds(0),
    )
    relative_epsilon: bool = _pruning(
        "Divide a branch's response by the RMS of the block's input, so that one epsilon fits"
        " networks of any width.",
        default=False,
    )
    epsilon_warmup: int = _pruning(
        "Epochs with open gates before epsilon applies; use more than 0 for networks whose"
        " branches start at zero.",
        Bounds(0, unit="EPOCHS"),
        default=0,
    )
    target_parameters: float | None = _pruning(
        "Adjust epsilon during training to reach this fraction of the parameters.",
        Bounds(0, 1, open=True, unit="FRACTION"),
        default=None,
    )
    target_flops: float | None = _pruning(
        "Adjust epsilon during training to reach this fraction of the floating-point operations.",
        Bounds(0, 1, open=True, unit="FRACTION"),
        default=None,
    )
    target_latency: float | None = _pruning(
        "Adjust epsilon during training to reach this fraction of the latency; each kind of block"
        " is timed before the first epoch.",
        Bounds(0, 1, open=True, unit="FRACTION"),
        default=None,
    )
    target_speedup: float | None = _pruning(
        "Adjust epsilon during training to reach 1/FACTOR of the latency.",
        Bounds(1, open=True, unit="FACTOR"),
        default=None,
    )
    timer: str | None = _pruning(
        "With --target-latency or --target-speedup: runtime that blocks are timed in, on one"
        " thread: ONNX Runtime or PyTorch.  [default: ort where it is installed]",
        ("ort", "torch"),
        default=None,
    )
    nested: bool = _pruning(
        "Train sub-networks of every depth together with the network, with open gates; eps-compact"
        " then cuts any of them from the checkpoint.",
        default=False,
    )
    criterion: str = _pruning(
        "With a target or --nested: prune first the blocks with the smallest response, response"
        " relative to the block's input, gradient of the gate, change of the block's input, or"
        " weights; or in random order.",
        ("response", "relative", "gradient", "influence", "l1", "random"),
        default="response",
    )
    max_accuracy_drop: float | None = _pruning(
        "With a target: raise epsilon only while validation accuracy is at most POINTS below its"
        " best.",
        Bounds(0, 100, unit="POINTS"),
        default=None,
    )
    patience: int = _pruning(
        "Consecutive epochs a gate must be closed on every step before its block is removed.",
        Bounds(2),  # a single closed epoch proves nothing
        default=2,
    )
    freeze_gates_at: float = _pruning(
        "Fraction of the run after which live gates stay open, so that the network that ships is"
        " the one that is trained; 1: never.",
        Bounds(0, 1),
        default=1.0,
    )
    live_removal: bool = _pruning(
        "Remove dead blocks from the network while it trains.", default=True
    )
    gate_scope: str = _pruning(
        "With several processes: gates decide by each process's part of the batch, or by the whole"
        " batch.",
        ("replica", "global"),
        default="replica",
    )

    optimizer: str = _optimizer(
        "torch's SGD, or AdamW (decoupled weight decay).", ("sgd", "adamw"), default="sgd"
    )
    lr_schedule: LrSchedule = _optimizer(  # noqa: RUF009
        "Learning rate by epoch, e.g. 0:0.1,60:0.01; or cosine:LR, which falls from LR to 0 over"
        " the run, without restarts."
    )
    lr_warmup: float = _optimizer(
        "Epochs in which the learning rate rises linearly from 0.",
        Bounds(0, unit="EPOCHS"),
        default=0.0,
    )
    lr_restart: Steps = _optimizer(  # noqa: RUF009
        "Learning rate by epochs since the last epoch that lost a block; none: no restarts.",
        default=(),
    )
    final_decay: Steps = _optimizer(  # noqa: RUF009
        "Upper limits of the learning rate by fraction of the run, e.g. 0.6:0.01; the first one"
        " ends all restarts; none: no limits."
    )
    momentum: float = _optimizer("SGD momentum; beta1 of AdamW.", Bounds(0, 0.9999), default=0.9)
    nesterov: bool = _optimizer("Use Nesterov momentum.", default=False)
    weight_decay: float = _optimizer("Weight decay of convolutions and linear layers.", Bounds(0))
    clip_grad_norm: float | None = _optimizer(
        "Scale gradients down to this norm, taken over all parameters, where it is larger.",
        Bounds(0, open=True, unit="NORM"),
        default=None,
    )
    label_smoothing: float = _optimizer(
        "Share of each label that is spread evenly over all classes.", Bounds(0, 1), default=0.0
    )
    ema: float = _optimizer(
        "Validate and save an exponential moving average of the weights with this decay per step;"
        " gates judge the trained weights; 0: none.",
        Bounds(0, 0.999999, unit="DECAY"),
        default=0.0,
    )
    class_weights: str = _optimizer(
        "Weight of each image's loss: all alike, or inversely to the number of training images of"
        " its class.",
        ("none", "balanced"),
        default="none",
    )
    accumulate: int = _optimizer(
        "Compute each step in so many parts of the batch, one after the other, and add up their"
        " gradients; needs the memory of one part.",
        Bounds(1, 4096, unit="PARTS"),
        default=1,
    )
    aux_loss_weight: float = _optimizer(
        "Weight of the side head's loss; 0: no side head.", Bounds(0), default=0.1
    )

    self_distillation: bool = _optimizer(
        "Once pruning may begin, distil from the network as it is then, whole; --teacher names"
        " another.",
        default=False,
    )
    distillation_weight: float = _optimizer(
        "With a teacher: weight of the distillation loss; the labels' loss has the rest.",
        Bounds(0, 1),
        default=0.5,
    )
    temperature: float = _optimizer(
        "With a teacher: softmax temperature of both networks.", Bounds(0.01), default=4.0
    )

    normalization: str = _input(
        "Normalize by mean and std of each channel; by the mean image and 128; or as the images"
        " were that --pretrained or --weights was trained on.",
        ("channel", "pixel", "pretrained"),
        default="channel",
    )
    augmentation: str = _input(
        "Random shifts and flips; the same after TrivialAugment; or the paper's augmentation for"
        " SVHN or ImageNet.",
        ("shift", "trivial", "svhn", "imagenet"),
        default="shift",
    )
    shift: int = _input("Largest random shift, in pixels.", Bounds(0, 1000), default=0)
    flip: bool = _input("Flip images horizontally at random.", default=False)
    random_erasing: float = _input(
        "Probability that a random rectangle of an image is replaced by the mean color.",
        Bounds(0, 1, unit="PROBABILITY"),
        default=0.0,
    )
    mixup: float = _input(
        "Blend each image and its label with another's, by a share from Beta(ALPHA, ALPHA); 0:"
        " never.",
        Bounds(0, unit="ALPHA"),
        default=0.0,
    )
    cutmix: float = _input(
        "Paste a rectangle of another image into each, of an area from Beta(ALPHA, ALPHA), and mix"
        " their labels alike; with --mixup, one of the two in each batch; 0: never.",
        Bounds(0, unit="ALPHA"),
        default=0.0,
    )

    precision: str = _hardware(
        "fp32 (TF32 off), tf32 (GPUs only), bf16 or fp16 (both mixed precision, fp16 with a loss"
        " scale).",
        ("fp32", "tf32", "bf16", "fp16"),
        default="fp32",
    )
    compile: bool = _hardware("Compile the network with torch.compile.", default=False)
    sync_batchnorm: bool = _hardware(
        "Synchronize batch norm over all processes (GPUs only).", default=False
    )
    # Part of the configuration because sums depend on it: the same seed gives the same network only
    # with the same number of threads.
    cpu_threads: int = _hardware(
        "CPU threads of torch; 0: one per core.", Bounds(0, 4096), default=0
    )

    def __post_init__(self) -> None:
        for item in fields(self)[1:]:
            name, value = _option_name(item), getattr(self, item.name)
            values = item.metadata["values"]
            if values is not None and value is not None and value not in values:
                among = f"one of {', '.join(values)}" if isinstance(values, tuple) else values
                raise ConfigError(f"{name} {value}: must be {among}")
        if isinstance(self.lr_schedule, CosineDecay):
            if not 0 <= self.lr_schedule.cosine < math.inf:
                raise ConfigError("--lr-schedule cosine:LR: LR must be finite and not negative")
            if self.lr_restart:
                raise ConfigError(
                    "--lr-restart only applies to a schedule of steps, not to cosine:LR; give"
                    " --lr-restart none"
                )
        elif not self.lr_schedule or self.lr_schedule[0][0] != 0:
            raise ConfigError("--lr-schedule must start at epoch 0")
        if self.batch_size % self.accumulate or self.batch_size < 2 * self.accumulate:
            raise ConfigError(
                f"--accumulate {self.accumulate}: a batch of {self.batch_size} images cannot be"
                " split into so many equal parts of at least 2; give another --batch-size"
            )
        if self.optimizer == "adamw" and self.nesterov:
            raise ConfigError("--nesterov only applies to --optimizer sgd; leave it out")
        targets = [name for name in TARGETS if getattr(self, name) is not None]
        given = [f"--{name.replace('_', '-')}" for name in targets]
        if len(given) > 1:
            raise ConfigError(
                f"{given[0]} and {given[1]} contradict each other: a run has one target; leave one"
                " of them out"
            )
        if self.nested and (self.epsilon is not None or given):
            raise ConfigError(
                f"--nested and {(*given, '--epsilon')[0]} contradict each other: a nested run keeps"
                " every block, and eps-compact cuts one size from its checkpoint; leave one of them"
                " out"
            )
        for name in ("self_distillation", "relative_epsilon"):
            if getattr(self, name) and (self.nested or self.plain):
                raise ConfigError(
                    f"--{name.replace('_', '-')} only applies to runs that prune, neither to"
                    " --nested nor to --epsilon 0; leave it out"
                )
        if self.self_distillation and self.epsilon is not None and not self.epsilon_warmup:
            raise ConfigError(
                "--self-distillation: the teacher would be a network that has not learned yet; give"
                " --epsilon-warmup 1 or more"
            )
        gated = self.epsilon != 0 and not self.nested
        if gated and self.head_epochs and self.epsilon_warmup <= self.head_epochs:
            raise ConfigError(
                f"--head-epochs {self.head_epochs}: gates would act on layers that are not trained"
                f" yet; give --epsilon-warmup {self.head_epochs + 1} or more"
            )
        if self.nested and self.compile:
            raise ConfigError("--nested: not with --compile; leave one of them out")
        if self.epsilon is None and not given and not self.nested:
            raise ConfigError(
                "--epsilon is missing; give it, or a target such as --target-parameters, or"
                " --nested instead"
            )
        if self.epsilon is not None and given:
            raise ConfigError(
                f"--epsilon and {given[0]} contradict each other: the target sets epsilon"
            )
        if self.criterion != "response" and not given and not self.nested:
            raise ConfigError(
                "--criterion only applies to targets such as --target-parameters, and to --nested;"
                " give one of them too"
            )
        if self.criterion in ("relative", "gradient", "influence") and self.compile:
            raise ConfigError(
                f"--criterion {self.criterion}: not with --compile, which hides the gates; leave"
                " one of them out"
            )
        if self.max_accuracy_drop is not None and not given:
            raise ConfigError(
                "--max-accuracy-drop only applies to targets such as --target-parameters; give one"
                " of them too"
            )
        if self.timer is not None and not {"target_latency", "target_speedup"} & {*targets}:
            raise ConfigError(
                "--timer only applies to --target-latency and --target-speedup; give one of them"
                " too"
            )

    @property
    def target(self) -> Target | None:
        """What the run is pruned to; None for a fixed epsilon, a baseline or a nested run."""
        values = ((name, getattr(self, name)) for name in TARGETS)
        return next((Target.of(name, value) for name, value in values if value is not None), None)

    @property
    def plain(self) -> bool:
        """Whether this run trains the baseline, a network without gates."""
        return self.epsilon == 0

    @property
    def first_look(self) -> bool:
        """Whether this run trains nothing, or the last layer alone."""
        return self.epochs <= self.head_epochs

    def baseline(self) -> TrainingConfig:
        """The same run for the baseline."""
        return override(self, {"epsilon": 0.0})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON and checkpoints hold it."""
        return plain_data(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """Inverse of :meth:`to_dict`. Raises ConfigError that names the first bad field."""
        unknown = sorted(values.keys() - {item.name for item in fields(cls)})
        if unknown:
            raise ConfigError(
                f"unknown configuration field {unknown[0]}; if an earlier version wrote it,"
                " CHANGELOG.md names the field that replaced it"
            )
        return from_plain_data(values, cls)


# -- Command-line options: one for every field, and `--config`

AUTO = "auto"  # value of --batch-size

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _option_name(item: Field[Any]) -> str:
    return f"--{item.name.replace('_', '-')}"


def choices(name: str) -> tuple[str, ...]:
    """Permitted values of the configuration field `name`."""
    return next(item.metadata["values"] for item in fields(TrainingConfig) if item.name == name)


def image_size(text: str) -> tuple[int, int]:
    """Read `SIZE` or `HEIGHTxWIDTH`, in pixels. Raises click.BadParameter."""
    height, _, width = text.partition("x")
    sizes = (height, width or height)
    if not all(side.isdecimal() and int(side) >= 8 for side in sizes):
        raise click.BadParameter(f"{text}: write SIZE or HEIGHTxWIDTH, in pixels, at least 8")
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
        raise click.BadParameter(f"{text}: FROM must increase, from 0 or above")
    if any(not 0 <= value < float("inf") for _, value in found):
        raise click.BadParameter(f"{text}: values must be finite and not negative")
    return found


def lr_schedule(text: str) -> LrSchedule:
    """Read `cosine:LR`, or a step function as :func:`steps`. Raises click.BadParameter."""
    kind, _, value = text.partition(":")
    if kind != "cosine":
        return steps(text)
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise click.BadParameter(f"{text}: write cosine:LR, for example cosine:0.1")
    return CosineDecay(found)


class SectionedCommand(click.Command):
    """A command whose help lists its options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        titles = {item.name: item.metadata.get("section") for item in fields(TrainingConfig)}
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = titles.get(str(parameter.name)) or "Command"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def config_options(function: _Function) -> _Function:
    """Decorate a command with an option for every field; those not given are None."""
    for item in reversed(fields(TrainingConfig)[1:]):
        name, told = _option_name(item), item.metadata
        decorate = click.option(
            f"{name}/--no-{name[2:]}" if item.type == "bool" else name,
            type=_click_type(item),
            metavar="SIZE" if item.name == "image_size" else getattr(told["values"], "unit", None),
            default=None,
            help=told["help"],
        )
        function = decorate(function)
    return function


class _BatchSize(click.IntRange):
    """A number of images, or `AUTO`, which the command replaces by a number."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == AUTO:
            return AUTO
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value} is neither {AUTO} nor a number from {self.min} on", param, ctx)


def _click_type(item: Field[Any]) -> Any:
    kind, values = str(item.type).removesuffix(" | None"), item.metadata["values"]
    if item.name == "batch_size":
        return _BatchSize(min=int(values.low))
    if isinstance(values, Bounds):
        if kind == "int":
            return click.IntRange(
                int(values.low), None if values.high is None else int(values.high)
            )
        return click.FloatRange(values.low, values.high, values.open, values.open)
    if values:
        return click.Choice(values)
    plain = {"bool": bool, "str": str}
    return {"LrSchedule": lr_schedule, "Steps": steps, "tuple[int, int]": image_size, **plain}[kind]


def read(path: Path) -> TrainingConfig:
    """Read a configuration that `--show-recipe` printed or a run wrote.

    Raises ConfigError that names the file when it is not one.
    """
    try:
        # As bytes: json finds UTF-8 with a byte order mark, and UTF-16, which PowerShell writes.
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"--config {path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: not a JSON object of configuration fields")
    try:
        return TrainingConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None


def override(base: TrainingConfig, given: Mapping[str, Any]) -> TrainingConfig:
    """`base` with the options that were given (those that are not None).

    An epsilon, a target of any currency and `nested` replace each other; a cosine replaces restarts
    and final decay of the base. An epsilon of the base does not become a relative one. Raises
    ConfigError for values that contradict each other.
    """
    values = {name: value for name, value in given.items() if value is not None}
    if values.get("nested") or TARGETS.keys() & values.keys():
        values = {"epsilon": None, "nested": False, **dict.fromkeys(TARGETS), **values}
    elif "epsilon" in values:
        values = {"criterion": "response", "nested": False, **values, **dict.fromkeys(TARGETS)}
    if values.get("nested") or values.get("epsilon") == 0:
        values.setdefault("self_distillation", False)
        values.setdefault("relative_epsilon", False)
    relative = values.get("relative_epsilon", base.relative_epsilon) != base.relative_epsilon
    if relative and "epsilon" not in values and base.epsilon:
        raise ConfigError(
            f"--relative-epsilon: the recipe's epsilon of {base.epsilon:g} has another unit; give"
            " --epsilon too"
        )
    kept = {name for name in TARGETS if values.get(name, getattr(base, name)) is not None}
    if not kept:
        values.setdefault("max_accuracy_drop", None)
    if not kept & {"target_latency", "target_speedup"}:
        values.setdefault("timer", None)
    if isinstance(values.get("lr_schedule"), CosineDecay):
        values.setdefault("lr_restart", ())
        values.setdefault("final_decay", ())
    if values.get("optimizer") == "adamw":
        values.setdefault("nesterov", False)
    return replace(base, **values)
