"""A training run's complete configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from eps_train.errors import ConfigError
from eps_train.schedule import Steps


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Everything that decides the outcome of a run; saved in its checkpoints.

    Attributes:
        recipe: name of the recipe it came from.
        dataset, model: as `--dataset` and `--model` take them.
        epochs, batch_size, seed: the usual; the last batch of an epoch may be smaller.
        epsilon: threshold of every gate, in units of the branch's output; 0 trains the plain
            network, which has no gates at all.
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
        shift, flip: augmentation, in pixels of random shift and with random mirroring.
        cpu_threads: torch's threads on a CPU, 0 for one a core. It is part of the configuration
            because sums depend on it: the same seed gives the same network only at the same count.
    """

    recipe: str
    dataset: str
    model: str
    epochs: int
    batch_size: int
    seed: int = 0
    epsilon: float
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
    shift: int = 0
    flip: bool = False
    cpu_threads: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
        if self.batch_size < 2:
            raise ConfigError("--batch-size must be at least 2: batch norm needs two images")
        if not 0 <= self.epsilon < float("inf"):
            raise ConfigError(f"--epsilon {self.epsilon:g}: must be finite and at least 0")
        if self.closed_epochs < 2:
            raise ConfigError("closed_epochs must be at least 2: one closed epoch proves nothing")
        if not self.rates or self.rates[0][0] != 0:
            raise ConfigError("rates must start at epoch 0")

    @property
    def plain(self) -> bool:
        """Whether this run trains the plain network, without gates."""
        return self.epsilon == 0

    def baseline(self) -> TrainingConfig:
        """The same run for the plain twin."""
        return replace(self, epsilon=0.0)

    def to_dict(self) -> dict[str, Any]:
        return {
            name: [list(step) for step in value] if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """Inverse of :meth:`to_dict`. Raises ConfigError for unknown or missing fields."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ConfigError(f"unknown configuration field {unknown[0]}")
        try:
            arguments: dict[str, Any] = {
                name: tuple((at, rate) for at, rate in value) if isinstance(value, list) else value
                for name, value in values.items()
            }
            return cls(**arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"not a training configuration: {error}") from None
