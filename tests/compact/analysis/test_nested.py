"""Cutting a nested run: any size, batch norms estimated again, proven against its own gates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eps_compact
from eps_compact.cli import main
from eps_deploy.cli import verify
from eps_train.gating import costs
from eps_train.training.checkpoint import Checkpoint
from tests.checkpoints import make_checkpoint
from tests.commands import Result, run

QUICK = ("--samples", "143", "--timer", "torch")
STAGES = range(3)
# The first three stay; then one of each stage goes after another.
ORDER = tuple(f"stages.{stage}.{block}" for block in (1, 0, 2) for stage in STAGES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint = make_checkpoint()
    checkpoint.order = ORDER
    checkpoint.save(tmp_path / "ckpt.pt")
    return tmp_path


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SECONDS_EACH", 0.02)


def compact(folder: Path, *args: object) -> Result:
    return run("eps-compact", main, "ckpt.pt", *args, *QUICK, cwd=folder)


def certificate(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "compact.json").read_text())
    return found


def test_the_sweep_follows_the_order(folder: Path) -> None:
    result = compact(folder, "--sweep")
    assert result.code == 0, result.stderr
    found = certificate(folder)["sweep"]
    assert found["nested"]
    gone = [tuple(point["removed"]) for point in found["points"]]
    assert gone == [ORDER[::-1][:count] for count in range(7)]
    assert found["measured_on"] == 143
    assert "in the order of the nested training" in result.stderr
    assert not (folder / "cut.pt").exists()
    assert certificate(folder)["counts"]["blocks"]["after"] == 9, "nothing was selected"


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_a_size_is_cut_and_can_be_verified(folder: Path, share: float) -> None:
    result = compact(folder, "--target-flops", share)
    assert result.code == 0, result.stderr
    found = certificate(folder)
    removed = tuple(found["nested"]["removed"])
    assert removed == ORDER[::-1][: len(removed)]
    flops = found["counts"]["flops"]
    assert flops["after"] <= share * flops["before"]
    assert found["lossless"], "of the network that was cut"
    assert f"cut from a nested run: {len(removed)} blocks removed" in result.stderr
    whole, cut = (Checkpoint.load(folder / name) for name in ("ckpt.pt", "cut.pt"))
    assert set(cut.network.gated) == set(ORDER) - set(removed)
    assert cut.order == ORDER[: len(ORDER) - len(removed)]
    # Weights are those of the nested run; statistics are not.
    for name, tensor in cut.state.items():
        statistic = name.endswith(("running_mean", "running_var"))
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, whole.state[name]) != statistic, name
    images = torch.randn(4, 1, 8, 8)
    plain = eps_compact.load(folder / "compact.pt")
    assert torch.allclose(plain(images), cut.build_gated().eval()(images), rtol=1e-4, atol=1e-4)
    verified = run("eps-verify", verify.main, "compact.pt", cwd=folder)
    assert verified.code == 0, verified.stderr


def test_a_cut_is_measured_as_it_ships(folder: Path) -> None:
    compact(folder, "--target-flops", 0.5)
    nested, point = certificate(folder)["nested"], certificate(folder)["sweep"]["points"][-1]
    assert nested["samples"] == 143
    selected = certificate(folder)["sweep"]["goal"]["point"]
    point = certificate(folder)["sweep"]["points"][selected]
    assert nested["cut"] == pytest.approx(point["accuracy"])
    assert Checkpoint.load(folder / "cut.pt").metrics["test"] == nested["test"]


def test_fine_tuning_starts_from_the_cut(folder: Path) -> None:
    result = compact(folder, "--target-flops", 0.5, "--finetune-epochs", 1)
    assert result.code == 0, result.stderr
    found = certificate(folder)
    kept = "tuned.pt" if "finetune" in found else "cut.pt"  # it may have lost accuracy
    assert found["checkpoint"]["path"] == kept
    assert [path.name for path in folder.glob("*t*.pt") if path.name != "compact.pt"].count(kept)
    gone = set(found["nested"]["removed"])
    assert gone == set(Checkpoint.load(folder / kept).network.removed)


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    assert compact(folder, "--target-flops", 0.5, "--dry-run").code == 0
    assert [path.name for path in folder.iterdir()] == ["ckpt.pt"]
