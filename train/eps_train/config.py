"""A training run's complete configuration."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from eps_train.errors import ConfigError
from eps_train.schedule import Steps

CHOICES = {
    "normalization": ("channel", "pixel"),
    "augmentation": ("shift", "svhn", "imagenet"),
    "precision": ("fp32", "tf32", "bf16", "fp16"),
    "gate_scope": ("replica", "global"),
}

_ANY = sys.float_info.max  # below infinity and not a number
_LIMITS = {
    "epsilon_from": (0, _ANY),
    "settle_at": (0, 1),
    "momentum": (0, 0.9999),
    "weight_decay": (0, _ANY),
    "side_weight": (0, _ANY),
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
        epsilon_from: 0-based epoch from which epsilon acts; before it all gates are open.
        settle_at: share of the run after which live gates stay open, so that what ships is what
            is trained; 1 never does that (as in the paper).
        closed_epochs: K, whole epochs in a row a gate must be closed on every step to be dead.
        live_removal: take dead blocks out of the running network.
        rates: learning rate from the 0-based epoch on.
        restart: the same, counted from an epoch that lost a block; empty: no restarts.
        descent: caps on the rate from a share of the run on; the first of them ends all restarts.
        momentum, nesterov, weight_decay: of SGD; only weights of convolutions and linear layers
            decay.
        side_weight: weight of the side head's cross-entropy; 0 for none.
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
    epsilon_from: int = 0
    settle_at: float = 1.0
    closed_epochs: int = 2
    live_removal: bool = True
    rates: Steps
    restart: Steps = ()
    descent: Steps
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float
    side_weight: float = 0.1
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
        if self.closed_epochs < 2:
            raise ConfigError("--closed-epochs must be at least 2: one closed epoch proves nothing")
        if not self.rates or self.rates[0][0] != 0:
            raise ConfigError("--rates must start at epoch 0")
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
