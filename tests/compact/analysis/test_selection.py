"""`eps-compact` beyond dead blocks: importance, sweep, targets, fine-tuning, exports."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eps_compact.analysis import selection
from eps_compact.artifact import CompactArtifact
from eps_compact.certificate import ProofError
from eps_compact.cli import main
from eps_core.errors import TrainingError
from eps_deploy.cli import verify
from eps_train.gating import costs
from eps_train.training import forward
from tests.checkpoints import make_checkpoint
from tests.commands import Result, files_in, run

QUICK = ("--samples", "143", "--timer", "torch")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "ckpt.pt"
    make_checkpoint(dead=("stages.2.1",)).save(path)
    return path


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copy(made, tmp_path)
    return tmp_path


def compact(folder: Path, *args: object) -> Result:
    return run("eps-compact", main, "ckpt.pt", *args, cwd=folder)


def certificate(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "compact.json").read_text())
    return found


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SECONDS_EACH", 0.02)


def test_the_importance_of_every_live_block(folder: Path) -> None:
    """Timed on ONNX Runtime, which the networks will run on, unless something else is asked for."""
    result = compact(folder, "--importance")
    assert result.code == 0, result.stderr
    found = certificate(folder)["importance"]
    assert found["timer"].startswith("onnxruntime ")
    assert "times: onnxruntime " in result.stderr
    listed = [entry["block"] for entry in found["entries"]]
    assert len(listed) == 8
    assert "stages.2.1" not in listed
    assert all(block in result.stderr for block in listed)


def test_a_sweep_alone_shows_the_curve_and_removes_nothing_more(folder: Path) -> None:
    result = compact(folder, "--sweep", *QUICK, "--json")
    assert result.code == 0, result.stderr
    assert certificate(folder)["sweep"]["timer"].startswith("torch ")
    points = certificate(folder)["sweep"]["points"]
    assert points[0]["removed"] == []
    assert points[-1]["parameters"] < points[0]["parameters"]
    assert certificate(folder)["lossless"]
    assert CompactArtifact.load(folder / "compact.pt").network.removed == ("stages.2.1",)
    with Image.open(folder / "pareto.png") as image:
        image.verify()
    assert json.loads(result.stdout)["written"]["pareto"] == "pareto.png"


def test_a_target_is_met_and_called_not_lossless(folder: Path) -> None:
    result = compact(folder, "--target-parameters", 0.5, *QUICK)
    assert result.code == 0, result.stderr
    counts = certificate(folder)["counts"]["parameters"]
    assert counts["after"] <= 0.5 * counts["before"]
    assert not certificate(folder)["lossless"]
    assert "NOT lossless" in result.stderr
    sweep = certificate(folder)["sweep"]
    assert sweep["goal"]["asked"]["target_parameters"] == 0.5
    point = sweep["points"][sweep["goal"]["point"]]
    (told,) = [line for line in result.stderr.splitlines() if line.startswith("asked for")]
    assert told.startswith(
        f"asked for --target-parameters 0.5; found {point['parameters_share']:.1%} of the"
    )
    assert told.endswith(f"{len(point['removed'])} live blocks removed")


def test_everything_is_computed_on_the_device_that_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that can be told from the default one, and computes without a GPU: `cpu:0`."""
    asked: list[str] = []
    moved: set[str] = set()
    move = torch.nn.Module.to

    def choose(name: str) -> torch.device:
        asked.append(name)
        return torch.device("cpu", 0)

    def to(module: torch.nn.Module, *args: Any, **options: Any) -> torch.nn.Module:
        if args[:1] == (torch.device("cpu", 0),):
            moved.add(sys._getframe(1).f_globals["__name__"])
        return move(module, *args, **options)

    monkeypatch.setattr(forward, "choose", choose)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    options = ("--importance", "--target-parameters", 0.5, "--finetune-epochs", 1)
    result = compact(folder, *options, "--device", "cuda:3", *QUICK)
    assert result.code == 0, result.stderr
    assert asked == ["cuda:3"]
    assert moved >= {
        "eps_compact.analysis.sweep",
        "eps_compact.analysis.importance",
        "eps_compact.analysis.selection",
    }
    assert "eps_train.training.trainer" in moved
    assert compact(folder, "--force").code == 0
    assert asked == ["cuda:3", "auto"]


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    before = files_in(folder)
    result = compact(folder, "--sweep", "--device", "cuda:99")
    assert result.code == 1
    assert result.error.startswith("eps-compact: error: --device cuda:99: torch sees ")
    assert files_in(folder) == before


def test_a_target_that_no_network_meets_is_refused(folder: Path) -> None:
    before = files_in(folder)
    result = compact(folder, "--target-parameters", 0.0001, *QUICK)
    assert result.code == 1
    assert "--target-parameters" in result.error
    assert files_in(folder) == before


def test_a_fine_tuned_network_is_kept_and_can_be_verified(folder: Path) -> None:
    result = compact(folder, "--target-parameters", 0.5, "--finetune-epochs", 2, *QUICK)
    assert result.code == 0, result.stderr
    told = certificate(folder)["finetune"]
    assert told["epochs"] == 2
    assert told["removed"]
    assert "NOT lossless: fine-tuned for 2 epochs" in result.stderr
    counts = certificate(folder)["counts"]["blocks"]
    assert counts["after"] == counts["before"] - 1 - len(told["removed"])
    assert certificate(folder)["checkpoint"]["path"] == "tuned.pt"
    again = run("eps-verify", verify.main, "compact.pt", cwd=folder)
    assert again.code == 0, again.stderr


def test_exports_lie_beside_the_artifact(folder: Path) -> None:
    result = compact(folder, "--export", "pt2", "--export", "safetensors")
    assert result.code == 0, result.stderr
    endings = ("json", "png", "pt", "pt2", "safetensors")
    assert sorted(files_in(folder)) == ["ckpt.pt", *(f"compact.{ending}" for ending in endings)]


@pytest.mark.parametrize(
    ("options", "file"),
    [
        (("--sweep",), "pareto.png"),
        (("--finetune-epochs", 1), "tuned.pt"),
        (("--export", "safetensors"), "compact.safetensors"),
    ],
)
def test_existing_files_are_refused_before_any_work(
    options: tuple[object, ...], file: str, folder: Path
) -> None:
    (folder / file).write_text("mine")
    before = files_in(folder)
    result = compact(folder, *options)
    assert result.code == 1
    assert result.error.startswith(f"eps-compact: error: {file}: exists already")
    assert files_in(folder) == before


def test_a_checkpoint_is_not_overwritten_by_the_fine_tuned_one(folder: Path) -> None:
    (folder / "ckpt.pt").rename(folder / "tuned.pt")
    before = files_in(folder)
    result = run("eps-compact", main, "tuned.pt", "--finetune-epochs", 1, "--force", cwd=folder)
    assert result.code == 1
    assert "tuned.pt: would overwrite the checkpoint" in result.error
    assert files_in(folder) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--no-data", "--importance"), "--no-data: --importance needs the held-out images"),
        (("--no-data", "--target-flops", 0.5), "--no-data: --target-flops needs the held-out"),
        (("--samples", 5), "--samples: only applies to --importance and --sweep"),
        (("--timer", "ort"), "--timer: only applies to --importance and --sweep"),
        (("--device", "cpu"), "--device: only applies to --importance, --sweep and --finetune"),
    ],
)
def test_options_that_cannot_go_together(
    options: tuple[object, ...], message: str, folder: Path
) -> None:
    result = compact(folder, *options)
    assert result.code == 1
    assert message in result.error


@pytest.mark.parametrize(
    ("output", "options", "file"),
    [("pareto.pt", ("--sweep",), "pareto.png"), ("a.pt2", ("--export", "pt2"), "a.pt2")],
)
def test_one_name_for_two_files_is_refused(
    output: str, options: tuple[str, ...], file: str, folder: Path
) -> None:
    result = compact(folder, "-o", output, *options)
    assert result.code == 1
    assert f"-o {output}: {file} would be written twice; name another" in result.error


@pytest.mark.parametrize(
    ("failing", "error", "code"),
    [
        ("eps_compact.certificate.prove", ProofError("differs"), 3),
        ("eps_compact.analysis.importance.measure_importance", TrainingError("not finite"), 1),
        ("eps_compact.artifact.CompactArtifact.save", OSError(errno.ENOSPC, "No space left"), 1),
        ("eps_compact.plots.draw_blocks", KeyboardInterrupt(), 130),
    ],
)
def test_a_fine_tuned_network_is_written_with_all_other_files_or_not_at_all(
    failing: str, error: BaseException, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise error

    def better(*arguments: Any, **options: Any) -> selection.Finetuned:
        return replace(finetune(*arguments, **options), before=0.0)  # never discarded

    finetune = selection.finetune
    monkeypatch.setattr(selection, "finetune", better)
    monkeypatch.setattr(failing, fails)
    (folder / "tuned.pt").write_text("earlier")
    before = files_in(folder)
    options = ("--target-parameters", 0.5, "--finetune-epochs", 1, "--importance", "--force")
    result = compact(folder, *options, *QUICK)
    assert result.code == code, result.stderr
    assert files_in(folder) == before
    if code == 3:
        assert "nothing was written" in result.error


def test_a_dry_run_writes_nothing_of_all_this(folder: Path) -> None:
    before = files_in(folder)
    result = compact(
        folder, "--dry-run", "--target-parameters", 0.5, "--finetune-epochs", 1, *QUICK
    )
    assert result.code == 0, result.stderr
    assert files_in(folder) == before
