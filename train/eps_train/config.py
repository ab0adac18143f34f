"""The configuration of a training run.

Each field of :class:`TrainingConfig` is declared once: its type, default, help text, limits and
section. The options of `eps-train`, the checks and `--show-recipe` follow from that declaration.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
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

    def lists(value: Any) -> Any:
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
    """Limits of a number; `high` None: any finite one. `open` excludes both ends."""

    low: float
    high: float | None = None
    open: bool = False

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
    metavar: str | None = None,
) -> dict[str, Any]:
    """Metadata of a field: section, help text, permitted values and placeholder of its option."""
    return {"section": section, "help": help, "values": values, "metavar": metavar}


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
    dataset: str = field(
        metadata=_run(
            "digits, mnist, fashion-mnist, cifar10, cifar100, svhn, imagenet, folder:PATH with one"
            " folder of images per class, csv:PATH, a file with the columns path and label, or"
            " hf:PATH or hf:NAME, a data set of Hugging Face."
        )
    )
    image_size: tuple[int, int] | None = field(
        default=None,
        metadata=_run("Resize images to SIZE or HEIGHTxWIDTH, in pixels.", metavar="SIZE"),
    )
    fit: str = field(
        default="crop",
        metadata=_run(
            "Images of another aspect ratio: crop at the center, or letterbox: show the whole image"
            " on gray.",
            FITS,
        ),
    )
    model: str = field(
        metadata=_run(
            "cifar:DEPTH, imagenet:DEPTH (or DEPTHxWIDTH), torchvision:NAME,"
            " timm:NAME[,ARGUMENT=VALUE], or package.module:factory."
        )
    )
    epochs: int = field(
        metadata=_run("Number of epochs; 0 evaluates the weights as they are.", Bounds(0))
    )
    batch_size: int = field(
        metadata=_run(
            "Images per step, over all processes; auto: the largest power of two that fits in the"
            " memory of the GPU, with at least 64 steps in an epoch.",
            Bounds(2),
            metavar="NUMBER|auto",
        )
    )
    early_stopping: int = field(
        default=0,
        metadata=_run(
            "Stop after so many epochs without a better validation accuracy, though not before a"
            " target is met; 0: never.",
            Bounds(0),
            metavar="EPOCHS",
        ),
    )
    head_epochs: int = field(
        default=0,
        metadata=_run(
            "Of these epochs, train only the last layer in so many at the start; for --pretrained"
            " and --weights.",
            Bounds(0),
            metavar="EPOCHS",
        ),
    )
    seed: int = field(default=0, metadata=_run("Random seed.", Bounds(0, 2**32 - 1)))

    epsilon: float | None = field(
        metadata=_pruning(
            "Threshold of all gates, in units of the branch's output; 0 trains the baseline without"
            " gates.",
            Bounds(0),
        )
    )
    relative_epsilon: bool = field(
        default=False,
        metadata=_pruning(
            "Divide a branch's response by the RMS of the block's input, so that one epsilon fits"
            " networks of any width."
        ),
    )
    epsilon_warmup: int = field(
        default=0,
        metadata=_pruning(
            "Epochs with open gates before epsilon applies; use more than 0 for networks whose"
            " branches start at zero.",
            Bounds(0),
            metavar="EPOCHS",
        ),
    )
    target_parameters: float | None = field(
        default=None,
        metadata=_pruning(
            "Adjust epsilon during training to reach this fraction of the parameters.",
            Bounds(0, 1, open=True),
            metavar="FRACTION",
        ),
    )
    target_flops: float | None = field(
        default=None,
        metadata=_pruning(
            "Adjust epsilon during training to reach this fraction of the floating-point"
            " operations.",
            Bounds(0, 1, open=True),
            metavar="FRACTION",
        ),
    )
    target_latency: float | None = field(
        default=None,
        metadata=_pruning(
            "Adjust epsilon during training to reach this fraction of the latency; each kind of"
            " block is timed before the first epoch.",
            Bounds(0, 1, open=True),
            metavar="FRACTION",
        ),
    )
    target_speedup: float | None = field(
        default=None,
        metadata=_pruning(
            "Adjust epsilon during training to reach 1/FACTOR of the latency.",
            Bounds(1, open=True),
            metavar="FACTOR",
        ),
    )
    timer: str | None = field(
        default=None,
        metadata=_pruning(
            "With --target-latency or --target-speedup: runtime that blocks are timed in, on one"
            " thread: ONNX Runtime or PyTorch.  [default: ort where it is installed]",
            ("ort", "torch"),
        ),
    )
    nested: bool = field(
        default=False,
        metadata=_pruning(
            "Train sub-networks of every depth together with the network, with open gates;"
            " eps-compact then cuts any of them from the checkpoint."
        ),
    )
    criterion: str = field(
        default="response",
        metadata=_pruning(
            "With a target or --nested: prune first the blocks with the smallest"
            " response, response relative to the block's input, gradient of the gate, change of the"
            " block's input, or weights; or in random order.",
            ("response", "relative", "gradient", "influence", "l1", "random"),
        ),
    )
    max_accuracy_drop: float | None = field(
        default=None,
        metadata=_pruning(
            "With a target: raise epsilon only while validation accuracy is at most"
            " POINTS below its best.",
            Bounds(0, 100),
            metavar="POINTS",
        ),
    )
    patience: int = field(
        default=2,
        metadata=_pruning(
            "Consecutive epochs a gate must be closed on every step before its block is removed.",
            Bounds(2),  # a single closed epoch proves nothing
        ),
    )
    freeze_gates_at: float = field(
        default=1.0,
        metadata=_pruning(
            "Fraction of the run after which live gates stay open, so that the network that ships"
            " is the one that is trained; 1: never.",
            Bounds(0, 1),
        ),
    )
    live_removal: bool = field(
        default=True, metadata=_pruning("Remove dead blocks from the network while it trains.")
    )
    gate_scope: str = field(
        default="replica",
        metadata=_pruning(
            "With several processes: gates decide by each process's part of the batch, or by the"
            " whole batch.",
            ("replica", "global"),
        ),
    )

    optimizer: str = field(
        default="sgd",
        metadata=_optimizer("torch's SGD, or AdamW (decoupled weight decay).", ("sgd", "adamw")),
    )
    lr_schedule: LrSchedule = field(
        metadata=_optimizer(
            "Learning rate by epoch, e.g. 0:0.1,60:0.01; or cosine:LR, which falls from LR to 0"
            " over the run, without restarts."
        )
    )
    lr_warmup: float = field(
        default=0.0,
        metadata=_optimizer(
            "Epochs in which the learning rate rises linearly from 0.", Bounds(0), metavar="EPOCHS"
        ),
    )
    lr_restart: Steps = field(
        default=(),
        metadata=_optimizer(
            "Learning rate by epochs since the last epoch that lost a block; none: no restarts."
        ),
    )
    final_decay: Steps = field(
        metadata=_optimizer(
            "Upper limits of the learning rate by fraction of the run, e.g. 0.6:0.01; the first one"
            " ends all restarts; none: no limits."
        )
    )
    momentum: float = field(
        default=0.9, metadata=_optimizer("SGD momentum; beta1 of AdamW.", Bounds(0, 0.9999))
    )
    nesterov: bool = field(default=False, metadata=_optimizer("Use Nesterov momentum."))
    weight_decay: float = field(
        metadata=_optimizer("Weight decay of convolutions and linear layers.", Bounds(0))
    )
    clip_grad_norm: float | None = field(
        default=None,
        metadata=_optimizer(
            "Scale gradients down to this norm, taken over all parameters, where it is larger.",
            Bounds(0, open=True),
            metavar="NORM",
        ),
    )
    label_smoothing: float = field(
        default=0.0,
        metadata=_optimizer(
            "Share of each label that is spread evenly over all classes.", Bounds(0, 1)
        ),
    )
    ema: float = field(
        default=0.0,
        metadata=_optimizer(
            "Validate and save an exponential moving average of the weights with this decay per"
            " step; gates judge the trained weights; 0: none.",
            Bounds(0, 0.999999),
            metavar="DECAY",
        ),
    )
    class_weights: str = field(
        default="none",
        metadata=_optimizer(
            "Weight of each image's loss: all alike, or inversely to the number of training images"
            " of its class.",
            ("none", "balanced"),
        ),
    )
    accumulate: int = field(
        default=1,
        metadata=_optimizer(
            "Compute each step in so many parts of the batch, one after the other, and add up their"
            " gradients; needs the memory of one part.",
            Bounds(1, 4096),
            metavar="PARTS",
        ),
    )
    aux_loss_weight: float = field(
        default=0.1,
        metadata=_optimizer("Weight of the side head's loss; 0: no side head.", Bounds(0)),
    )

    self_distillation: bool = field(
        default=False,
        metadata=_optimizer(
            "Once pruning may begin, distil from the network as it is then, whole; --teacher names"
            " another."
        ),
    )
    distillation_weight: float = field(
        default=0.5,
        metadata=_optimizer(
            "With a teacher: weight of the distillation loss; the labels' loss has the rest.",
            Bounds(0, 1),
        ),
    )
    temperature: float = field(
        default=4.0,
        metadata=_optimizer("With a teacher: softmax temperature of both networks.", Bounds(0.01)),
    )

    normalization: str = field(
        default="channel",
        metadata=_input(
            "Normalize by mean and std of each channel; by the mean image and 128; or as the images"
            " were that --pretrained or --weights was trained on.",
            ("channel", "pixel", "pretrained"),
        ),
    )
    augmentation: str = field(
        default="shift",
        metadata=_input(
            "Random shifts and flips; the same after TrivialAugment; or the paper's augmentation"
            " for SVHN or ImageNet.",
            ("shift", "trivial", "svhn", "imagenet"),
        ),
    )
    shift: int = field(
        default=0, metadata=_input("Largest random shift, in pixels.", Bounds(0, 1000))
    )
    flip: bool = field(default=False, metadata=_input("Flip images horizontally at random."))
    random_erasing: float = field(
        default=0.0,
        metadata=_input(
            "Probability that a random rectangle of an image is replaced by the mean color.",
            Bounds(0, 1),
            metavar="PROBABILITY",
        ),
    )
    mixup: float = field(
        default=0.0,
        metadata=_input(
            "Blend each image and its label with another's, by a share from Beta(ALPHA, ALPHA); 0:"
            " never.",
            Bounds(0),
            metavar="ALPHA",
        ),
    )
    cutmix: float = field(
        default=0.0,
        metadata=_input(
            "Paste a rectangle of another image into each, of an area from Beta(ALPHA, ALPHA), and"
            " mix their labels alike; with --mixup, one of the two in each batch; 0: never.",
            Bounds(0),
            metavar="ALPHA",
        ),
    )

    precision: str = field(
        default="fp32",
        metadata=_hardware(
            "fp32 (TF32 off), tf32 (GPUs only), bf16 or fp16 (both mixed precision, fp16 with a"
            " loss scale).",
            ("fp32", "tf32", "bf16", "fp16"),
        ),
    )
    compile: bool = field(
        default=False, metadata=_hardware("Compile the network with torch.compile.")
    )
    sync_batchnorm: bool = field(
        default=False, metadata=_hardware("Synchronize batch norm over all processes (GPUs only).")
    )
    # Part of the configuration because sums depend on it: the same seed gives the same network only
    # with the same number of threads.
    cpu_threads: int = field(
        default=0, metadata=_hardware("CPU threads of torch; 0: one per core.", Bounds(0, 4096))
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
            other = given[0] if given else "--epsilon"
            raise ConfigError(
                f"--nested and {other} contradict each other: a nested run keeps every block, and"
                " eps-compact cuts one size from its checkpoint; leave one of them out"
            )
        if self.self_distillation and (self.nested or self.plain):
            raise ConfigError(
                "--self-distillation only applies to runs that prune, neither to --nested nor to"
                " --epsilon 0; leave it out"
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
        if self.relative_epsilon and (self.nested or self.plain):
            raise ConfigError(
                "--relative-epsilon only applies to runs that prune, neither to --nested nor to"
                " --epsilon 0; leave it out"
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
        for name in TARGETS:
            value: float | None = getattr(self, name)
            if value is not None:
                return Target.of(name, value)
        return None

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
        return replace(
            self,
            epsilon=0.0,
            target_parameters=None,
            target_flops=None,
            target_latency=None,
            target_speedup=None,
            timer=None,
            nested=False,
            relative_epsilon=False,
            criterion="response",
            max_accuracy_drop=None,
            self_distillation=False,
        )

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
    if not all(size.isdecimal() and int(size) >= 8 for size in sizes):
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
            metavar=told["metavar"],
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
