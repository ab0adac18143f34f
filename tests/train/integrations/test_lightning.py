"""The callback for Lightning: against the package where it is installed, else a stand-in."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from eps_core.errors import ConfigError
from eps_train.gating.pruner import BlockPruner
from tests.train.integrations.standins import LightningCallback, LightningTrainer, installed
from tests.train.loops import EXAMPLE, HELDOUT, SHUT, SubsetPruner, batches, own_net

NAME = "eps_train.integrations.lightning"
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
REAL = importlib.util.find_spec("lightning") is not None


@pytest.fixture(autouse=True)
def adapter() -> Iterator[ModuleType]:
    sys.modules.pop(NAME, None)
    if REAL:
        yield importlib.import_module(NAME)
    else:
        members = {"Callback": LightningCallback}
        with installed(lightning={}, lightning__pytorch=members):
            yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def trainer(**settings: Any) -> Any:
    if not REAL:
        return LightningTrainer(**settings)
    settings.pop("world_size", None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return importlib.import_module("lightning.pytorch").Trainer(
        accelerator="cpu", enable_model_summary=False, **quiet, **settings
    )


def module_of(pruner: BlockPruner) -> Any:
    base = importlib.import_module("lightning.pytorch").LightningModule if REAL else nn.Module

    class Module(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.network = pruner.model

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            images, labels = batch
            return nn.functional.cross_entropy(self.network(images), labels)

        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            self.network(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    return Module()


def loader(found: Any) -> DataLoader[Any]:
    return DataLoader(found, batch_size=None)


def pruner(**settings: Any) -> SubsetPruner:
    return SubsetPruner(own_net(), example=EXAMPLE, epsilon=SHUT, **settings)


def test_a_block_dies_and_leaves_the_module_and_the_optimizer(adapter: Any) -> None:
    made = pruner()
    module = module_of(made)
    run = trainer(max_epochs=3, callbacks=[adapter.BlockPruning(made)], accumulate_grad_batches=3)
    run.fit(module, loader(batches(6)), loader(HELDOUT))
    assert made.tracker.dead == ("blocks.1",)
    record = made.tracker.records["blocks.0"]
    assert record.steps == 6, "one judgement for each pass"
    assert made.epoch == 3
    assert not any("blocks.1" in name for name in module.state_dict())
    assert len(run.optimizers[0].state) == len(list(module.parameters()))


def test_steps_are_those_of_the_optimizer(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, steps = pruner(), []
    monkeypatch.setattr(made, "end_epoch", lambda *_, **__: steps.append(made.steps))
    callback = adapter.BlockPruning(made)
    run = trainer(max_epochs=1, callbacks=[callback], accumulate_grad_batches=3)
    run.fit(module_of(made), loader(batches(6)), loader(HELDOUT))
    assert steps == [2]


def test_a_resumed_run_ends_in_the_same_weights(adapter: Any, tmp_path: Path) -> None:
    whole = pruner()
    run = trainer(max_epochs=2, callbacks=[adapter.BlockPruning(whole)])
    module = module_of(whole)
    run.fit(module, loader(batches()), loader(HELDOUT))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = pruner()
    callback = adapter.BlockPruning(again)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    callback.load_state_dict(content["callbacks"]["BlockPruning"])
    resumed = module_of(again)
    more = trainer(max_epochs=4, callbacks=[callback])
    more.fit(resumed, loader(batches()), loader(HELDOUT), ckpt_path=tmp_path / "last.ckpt")
    rest = trainer(max_epochs=4, callbacks=[adapter.BlockPruning(whole)])
    rest.fit(module, loader(batches()), loader(HELDOUT), ckpt_path=tmp_path / "last.ckpt")
    assert again.epoch == 4
    assert again.tracker.dead == ("blocks.1",)
    theirs = whole.model.state_dict()
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_held_out_data_of_its_own(adapter: Any) -> None:
    made = pruner()
    callback = adapter.BlockPruning(made, heldout=HELDOUT)
    trainer(max_epochs=2, callbacks=[callback]).fit(module_of(made), loader(batches()))
    death = made.tracker.records["blocks.1"].death
    assert death is not None
    assert death.samples == 16


def test_what_cannot_be_pruned(adapter: Any) -> None:
    made = pruner()
    with pytest.raises(ConfigError, match=r"does not hold pruner\.model"):
        trainer(max_epochs=1, callbacks=[adapter.BlockPruning(pruner())]).fit(
            module_of(made), loader(batches()), [loader(HELDOUT)]
        )
    with pytest.raises(ConfigError, match="no validation loader; give the callback heldout="):
        trainer(max_epochs=1, callbacks=[adapter.BlockPruning(made)]).fit(
            module_of(made), loader(batches())
        )


def test_several_processes(adapter: Any) -> None:
    run = LightningTrainer(max_epochs=1, callbacks=[], world_size=2)
    with pytest.raises(ConfigError, match="make the pruner with live_removal=False"):
        adapter.BlockPruning(made := pruner()).setup(run, module_of(made), "fit")
    made = pruner(live_removal=False)
    module = module_of(made)
    adapter.BlockPruning(made).setup(run, module, "fit")
    ignored = module._ddp_params_and_buffers_to_ignore
    assert "network.blocks.1.gate.peak" in ignored
    assert set(ignored) <= dict(module.named_buffers()).keys()


@pytest.mark.skipif(REAL, reason="Lightning is installed")
def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, NAME)
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="Lightning is not installed; pip install lightning"):
        importlib.import_module(NAME)
