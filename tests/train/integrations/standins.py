"""Stand-ins for Lightning and transformers: base classes of callbacks, and loops that call them.

They call the hooks that the adapters use in the order and with the arguments of the real trainers
(Lightning 2: `Trainer._run`, `_FitLoop`, `_TrainingEpochLoop`; transformers: `Trainer`,
`CallbackHandler.call_event`). Where the real package is installed, it is used in their place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class LightningCallback:
    """`lightning.pytorch.Callback`."""

    @property
    def state_key(self) -> str:
        return type(self).__qualname__

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None: ...

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None: ...

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class LightningTrainer:
    """`lightning.pytorch.Trainer` with one optimizer and gradient accumulation."""

    def __init__(
        self,
        *,
        max_epochs: int,
        callbacks: Sequence[Any],
        accumulate_grad_batches: int = 1,
        world_size: int = 1,
    ) -> None:
        self.max_epochs, self.callbacks = max_epochs, callbacks
        self.accumulate_grad_batches, self.world_size = accumulate_grad_batches, world_size
        self.optimizers: list[torch.optim.Optimizer] = []
        self.val_dataloaders: Any = None
        self.current_epoch = 0

    def fit(
        self,
        module: Any,
        train: Iterable[Any],
        val: Iterable[Any] | None = None,
        *,
        ckpt_path: str | Path | None = None,
    ) -> None:
        self.val_dataloaders = val
        for callback in self.callbacks:
            callback.setup(self, module, stage="fit")
        checkpoint = torch.load(ckpt_path, weights_only=True) if ckpt_path else None
        if checkpoint is not None:  # the module first, then the callbacks
            module.load_state_dict(checkpoint["state_dict"])
            for callback in self.callbacks:
                callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
        optimizer = module.configure_optimizers()
        self.optimizers = [optimizer]
        if checkpoint is not None:
            optimizer.load_state_dict(checkpoint["optimizer_states"][0])
            self.current_epoch = checkpoint["epoch"]
        while self.current_epoch < self.max_epochs:
            module.train()
            for number, batch in enumerate(train, start=1):
                loss = module.training_step(batch, number - 1) / self.accumulate_grad_batches
                loss.backward()
                if number % self.accumulate_grad_batches == 0:
                    for callback in self.callbacks:
                        callback.on_before_optimizer_step(self, module, optimizer)
                    optimizer.step()
                    optimizer.zero_grad()
            for callback in self.callbacks:
                callback.on_train_epoch_end(self, module)
            self.current_epoch += 1
        self._module = module

    def save_checkpoint(self, path: Path) -> None:
        content = {
            "epoch": self.current_epoch,
            "state_dict": self._module.state_dict(),
            "optimizer_states": [each.state_dict() for each in self.optimizers],
            "callbacks": {each.state_key: each.state_dict() for each in self.callbacks},
        }
        torch.save(content, path)


class HuggingFaceCallback:
    """`transformers.TrainerCallback`."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None: ...

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None: ...

    def on_epoch_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None: ...

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None: ...


@dataclass
class HuggingFaceTrainer:
    """`transformers.Trainer`, which saves a checkpoint at the end of each epoch."""

    model: nn.Module
    args: Any
    train_dataset: Sequence[dict[str, Tensor]]
    eval_dataset: Sequence[dict[str, Tensor]] = ()
    callbacks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.args.learning_rate)
        self.state = SimpleNamespace(global_step=0, epoch=0.0, is_world_process_zero=True)

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def get_eval_dataloader(self) -> Sequence[dict[str, Tensor]]:
        return self.eval_dataset

    def _call(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(
                self.args,
                self.state,
                SimpleNamespace(),
                model=self.model,
                optimizer=self.optimizer,
                lr_scheduler=None,
                train_dataloader=self.train_dataset,
                eval_dataloader=None,
                processing_class=None,
            )

    def train(self) -> None:
        self._call("on_train_begin")
        every = self.args.gradient_accumulation_steps
        for epoch in range(self.args.num_train_epochs):
            for number, batch in enumerate(self.train_dataset, start=1):
                self.model.train()
                (self.model(**batch)["loss"] / every).backward()
                if number % every == 0:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    self.state.global_step += 1
                    self._call("on_step_end")
            self.state.epoch = float(epoch + 1)
            self._call("on_epoch_end")
            self._call("on_save")


@contextmanager
def installed(**modules: dict[str, Any]) -> Iterator[None]:
    """Make modules of these names, with dots for `__`, importable with these members."""
    with pytest.MonkeyPatch.context() as patch:
        for name, members in modules.items():
            made = ModuleType(name.replace("__", "."))
            vars(made).update(members)
            patch.setitem(sys.modules, made.__name__, made)
        yield
