"""Lightning: a callback that prunes the network of a `LightningModule`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eps_core.errors import ConfigError
from eps_train.data.downloads import import_torchvision
from eps_train.data.inputs import Batch
from eps_train.gating.pruner import BlockPruner


def _callback_class() -> Any:
    with suppress(ModuleNotFoundError):
        import_torchvision()  # which Lightning's torchmetrics imports
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return import_module(package).Callback
        except ModuleNotFoundError as error:
            if error.name not in (package, package.partition(".")[0]):
                raise
    raise ConfigError(f"{__name__}: Lightning is not installed; pip install lightning")


class BlockPruning(_callback_class()):  # type: ignore[misc]
    """Steps a pruner, and ends its epochs with those of the trainer.

    The `LightningModule` holds `pruner.model` as an attribute. Checkpoints contain the state of the
    pruner. To resume, load it before the training, because it removes the dead blocks::

        callback.load_state_dict(torch.load("last.ckpt")["callbacks"]["BlockPruning"])
        trainer.fit(module, ckpt_path="last.ckpt")

    With several processes the pruner must be made with `live_removal=False`: Lightning's DDP holds
    on to the parameters that it wrapped.

    Args:
        pruner: of the network in the module.
        heldout: batches that are not trained on; by default the (first) validation loader of the
            trainer.
        averaged: an average of the weights that ships; see `BlockPruner.end_epoch`.
    """

    def __init__(
        self,
        pruner: BlockPruner,
        *,
        heldout: Iterable[Batch] | None = None,
        averaged: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pruner, self._heldout, self._averaged = pruner, heldout, averaged

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Check the module, before a strategy wraps it."""
        if stage != "fit":
            return
        names = [name for name, part in pl_module.named_modules() if part is self.pruner.model]
        if not names:
            raise ConfigError(
                "BlockPruning: the LightningModule does not hold pruner.model; assign it to an"
                " attribute of the module"
            )
        if trainer.world_size > 1:
            if self.pruner.live_removal:
                raise ConfigError(
                    "BlockPruning: with several processes make the pruner with live_removal=False"
                )
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                pl_module, self.pruner.local_buffers(f"{names[0]}." if names[0] else "")
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        self.pruner.step()

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        heldout = trainer.val_dataloaders if self._heldout is None else self._heldout
        if heldout is None:
            raise ConfigError(
                "BlockPruning: the trainer has no validation loader; give the callback heldout="
            )
        if isinstance(heldout, (list, tuple)) and self._heldout is None:
            heldout = heldout[0]
        self.pruner.end_epoch(heldout, optimizer=trainer.optimizers, averaged=self._averaged)

    def state_dict(self) -> dict[str, Any]:
        return self.pruner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.pruner.load_state_dict(state_dict)
