"""Hugging Face Trainer: a callback that prunes the network that it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eps_core.errors import ConfigError
from eps_train.data.inputs import Batch
from eps_train.gating.pruner import BlockPruner

STATE = "block_pruner.pt"  # in the folder of a checkpoint


def _callback_class() -> Any:
    try:
        return import_module("transformers").TrainerCallback
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
    raise ConfigError(f"{__name__}: transformers is not installed; pip install transformers")


class BlockPruningCallback(_callback_class()):  # type: ignore[misc]
    """Steps a pruner, and ends its epochs with those of the Trainer.

    The model of the Trainer holds `pruner.model`. With each checkpoint the state of the pruner is
    written beside the weights, as `block_pruner.pt`. To resume, load it before the Trainer is made,
    because it removes the dead blocks::

        pruner.load_state_dict(torch.load("out/checkpoint-500/block_pruner.pt"))
        trainer.train(resume_from_checkpoint="out/checkpoint-500")

    Args:
        pruner: of the network in the model.
        heldout: batches that are not trained on: dictionaries, as those of
            `trainer.get_eval_dataloader()`, inputs, or inputs and labels.
        inputs: key of the inputs in the dictionaries; that of the labels is `labels`.
        averaged: an average of the weights that ships; see `BlockPruner.end_epoch`.
    """

    def __init__(
        self,
        pruner: BlockPruner,
        heldout: Iterable[Batch | Mapping[str, Tensor]],
        *,
        inputs: str = "pixel_values",
        averaged: nn.Module | None = None,
    ) -> None:
        self.pruner, self._averaged = pruner, averaged
        self._heldout = _Unpacked(heldout, inputs)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any
    ) -> None:
        """Check the model."""
        if model is not None and not any(part is self.pruner.model for part in model.modules()):
            raise ConfigError(
                "BlockPruningCallback: the model of the Trainer does not hold pruner.model; assign"
                " it to an attribute of the model"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.pruner.step()

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **rest: Any
    ) -> None:
        optimizers = () if optimizer is None else [optimizer]
        self.pruner.end_epoch(self._heldout, optimizer=optimizers, averaged=self._averaged)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Write the state of the pruner into the checkpoint's folder."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.pruner.state_dict(), folder / STATE)


class _Unpacked:
    """Batches, those that are dictionaries as (inputs, labels); read anew in every pass."""

    def __init__(self, batches: Iterable[Batch | Mapping[str, Tensor]], inputs: str) -> None:
        self._batches, self._inputs = batches, inputs

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            if not isinstance(batch, Mapping):
                yield batch
                continue
            if self._inputs not in batch:
                raise ConfigError(
                    f"BlockPruningCallback: the batches have no {self._inputs}, but"
                    f" {', '.join(batch)}; name the inputs with inputs="
                )
            rest = [batch["labels"]] if "labels" in batch else []
            yield [batch[self._inputs], *rest]
