"""The callback for the Hugging Face Trainer: against a stand-in where it is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eps_core.errors import ConfigError
from eps_train.gating.pruner import BlockPruner
from tests.train.integrations.standins import HuggingFaceCallback, HuggingFaceTrainer, installed
from tests.train.loops import EXAMPLE, HELDOUT, SHUT, SubsetPruner, batches, own_net

NAME = "eps_train.integrations.transformers"
REAL = importlib.util.find_spec("transformers") is not None


@pytest.fixture(autouse=True)
def adapter() -> Iterator[ModuleType]:
    sys.modules.pop(NAME, None)
    if REAL:
        yield importlib.import_module(NAME)
    else:
        with installed(transformers={"TrainerCallback": HuggingFaceCallback}):
            yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


class Classifier(nn.Module):
    """A model as the Trainer wants it: a dictionary with a loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def dictionaries(found: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    return [{"pixel_values": images, "labels": labels} for images, labels in found]


def trainer(made: BlockPruner, folder: Path, *, every: int = 1) -> HuggingFaceTrainer:
    """The stand-in's loop, also where the package is installed: its own needs accelerate."""
    return HuggingFaceTrainer(
        model=Classifier(made.model),
        args=SimpleNamespace(
            output_dir=str(folder),
            num_train_epochs=3,
            gradient_accumulation_steps=every,
            learning_rate=0.01,
        ),
        train_dataset=dictionaries(batches(4)),
        eval_dataset=dictionaries(HELDOUT),
    )


def pruner() -> SubsetPruner:
    return SubsetPruner(own_net(), example=EXAMPLE, epsilon=SHUT)


@pytest.mark.parametrize("every", [1, 2])
def test_a_block_dies_and_leaves_the_model_and_the_optimizer(
    adapter: Any, tmp_path: Path, every: int
) -> None:
    made = pruner()
    run = trainer(made, tmp_path, every=every)
    run.add_callback(adapter.BlockPruningCallback(made, run.get_eval_dataloader()))
    run.train()
    assert made.tracker.dead == ("blocks.1",)
    death = made.tracker.records["blocks.1"].death
    assert death is not None
    assert (death.steps, death.samples) == (8, 16)
    assert len(run.optimizer.state) == len(list(run.model.parameters()))
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == sorted(f"checkpoint-{4 // every * epoch}" for epoch in (1, 2, 3))


def test_the_state_beside_a_checkpoint_resumes_the_pruner(adapter: Any, tmp_path: Path) -> None:
    made = pruner()
    run = trainer(made, tmp_path)
    run.add_callback(adapter.BlockPruningCallback(made, HELDOUT))
    run.train()
    again = pruner()
    state = torch.load(tmp_path / "checkpoint-8" / "block_pruner.pt", weights_only=True)
    again.load_state_dict(state)
    assert again.epoch == 2
    assert again.tracker.dead == ("blocks.1",)
    assert list(again.gates) == ["blocks.0", "blocks.2"]


def test_what_cannot_be_pruned(adapter: Any, tmp_path: Path) -> None:
    made = pruner()
    run = trainer(made, tmp_path)
    run.add_callback(adapter.BlockPruningCallback(pruner(), HELDOUT))
    with pytest.raises(ConfigError, match=r"model of the Trainer does not hold pruner\.model"):
        run.train()
    run.callbacks = [adapter.BlockPruningCallback(made, run.eval_dataset, inputs="images")]
    with pytest.raises(ConfigError, match="the batches have no images, but pixel_values, labels"):
        run.train()


@pytest.mark.skipif(REAL, reason="transformers is installed")
def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, NAME)
    for name in ("transformers",):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ConfigError, match="transformers is not installed; pip install transformers"
    ):
        importlib.import_module(NAME)
