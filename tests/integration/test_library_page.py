"""The code of docs/library.md runs: the script as it is, the other blocks with what they name."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import eps_compact
import eps_train
from eps_train.data.downloads import import_torchvision
from tests.meta.project import ROOT
from tests.train.integrations import standins
from tests.train.integrations.test_transformers import Classifier, dictionaries
from tests.train.loops import EXAMPLE, HELDOUT, OwnNet, batches, own_net, sgd, train_epoch

PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
SCRIPT = "EPOCHS, BATCH = 20, 64"
NEEDS_PROCESSES = "DistributedDataParallel("  # tests/train/gating/test_pruner.py has two of them


def blocks() -> dict[str, str]:
    """Python code by the heading that it is under."""
    parts = re.split(r"^#+ (.*)$", PAGE, flags=re.MULTILINE)[1:]
    found = {}
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if code:
            assert len(code) == 1, heading
            found[heading] = code[0]
    return found


@pytest.fixture
def frameworks() -> Iterator[None]:
    """The packages of the adapters; stand-ins where they are not installed."""
    lightning = {"Callback": standins.LightningCallback}
    hugging = {"TrainerCallback": standins.HuggingFaceCallback}
    names = [f"eps_train.integrations.{name}" for name in ("lightning", "transformers")]
    with standins.installed(lightning={}, lightning__pytorch=lightning, transformers=hugging):
        for name in names:
            sys.modules.pop(name, None)
        yield
        for name in names:
            sys.modules.pop(name, None)


class LitClassifier(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def hugging_face_trainer(**given: Any) -> Any:
    return standins.HuggingFaceTrainer(**given)


@pytest.mark.usefixtures("frameworks")
@pytest.mark.parametrize("heading", [name for name, code in blocks().items() if SCRIPT not in code])
def test_a_block_runs(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = blocks()[heading]
    if NEEDS_PROCESSES in code:
        compile(code, heading, "exec")
        return
    monkeypatch.chdir(tmp_path)
    image = torch.zeros(2, 3, 8, 8) if "0.485" in code else EXAMPLE
    net = own_net()
    if "0.485" in code:
        net.stem = nn.Conv2d(3, 4, 3, padding=1)
    pruner = eps_train.BlockPruner(own_net(), epsilon=1e9, example=EXAMPLE)
    optimizer = sgd(pruner)
    train_epoch(pruner, optimizer)
    lightning = "integrations.lightning" in code
    loader: Any = DataLoader(HELDOUT, batch_size=None) if lightning else HELDOUT  # type: ignore[arg-type]
    named: dict[str, Any] = {
        "torch": torch,
        "eps_train": eps_train,
        "eps_compact": eps_compact,
        "AveragedModel": AveragedModel,
        "get_ema_multi_avg_fn": get_ema_multi_avg_fn,
        "net": net,
        "new_net": own_net,
        "images": image,
        "pruner": pruner,
        "model": pruner.model,
        "optimizer": optimizer,
        "train_loader": batches(),
        "val_loader": loader,
        "train_one_epoch": lambda model, optimizer, pruner: train_epoch(pruner, optimizer),
        "Classifier": LitClassifier,
        "ImageClassifier": Classifier,
        "Trainer": standins.LightningTrainer if lightning else hugging_face_trainer,
        "train_data": dictionaries(batches()),
        "val_data": dictionaries(HELDOUT),
        "args": SimpleNamespace(
            output_dir=str(tmp_path),
            num_train_epochs=3,
            gradient_accumulation_steps=1,
            learning_rate=0.01,
        ),
    }
    if heading == "Resuming":  # the pruner of the page has a target
        named["pruner"] = eps_train.BlockPruner(
            own_net(), target=eps_train.Parameters(0.6), example=EXAMPLE, epochs=20
        )
        named["model"] = named["pruner"].model
        named["optimizer"] = torch.optim.AdamW(named["model"].parameters(), lr=2e-3)
    code = code.replace("mypackage.nets:Net", f"{OwnNet.__module__}:{OwnNet.__name__}")
    code = code.replace("folder:images", "digits").replace("range(20)", "range(2)")
    exec(compile(code, heading, "exec"), named)
    if "trainer" in named:
        assert named["pruner"].epoch == 3
        assert named["pruner"].tracker.dead


@pytest.mark.slow
def test_the_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As it is on the page, with fewer images and epochs."""
    import_torchvision()  # which timm imports
    pytest.importorskip("timm")
    (code,) = (code for code in blocks().values() if SCRIPT in code)
    assert len(code.splitlines()) <= 50
    from sklearn import datasets

    few = datasets.load_digits()
    few["images"], few["target"] = few["images"][:60], few["target"][:60]
    monkeypatch.setattr(datasets, "load_digits", lambda: few)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace(SCRIPT, "EPOCHS, BATCH = 1, 16"), "script", "exec"), {})
    printed = capsys.readouterr().out
    assert "epoch 1: 100% of the parameters left" in printed
    assert "passed: " in printed
    assert (tmp_path / "bundle" / "manifest.json").exists()
