"""`eps-compact` as a user meets it: what it says, what it writes, how it ends."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import fx, nn

import eps_compact
from eps_compact.artifact import CompactArtifact
from eps_compact.cli import main
from eps_compact.plots import draw_blocks
from eps_core import checksummed
from eps_train.training.checkpoint import FORMAT, VERSION, Checkpoint
from tests.checkpoints import make_checkpoint
from tests.commands import Result, files_in, run

DEAD = ("stages.0.1", "stages.1.0", "stages.2.1", "stages.2.2")
BLOCKS = tuple(f"stages.{stage}.{block}" for stage in range(3) for block in range(3))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "ckpt.pt"
    make_checkpoint(dead=DEAD).save(path)
    return path


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A folder with one good `ckpt.pt`."""
    shutil.copy(made, tmp_path)
    return tmp_path


def compact(folder: Path, *args: object) -> Result:
    return run("eps-compact", main, *args, cwd=folder)


def assert_refused(folder: Path, result: Result, message: str, code: int = 1) -> None:
    """One clear line, the exit status, and nothing but the checkpoint in the folder."""
    assert result.code == code, result.stderr
    assert message in result.error
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not list(folder.glob("*compact*"))


@torch.no_grad()
def assert_same_answers(path: Path, checkpoint: Checkpoint, *, folded: bool = True) -> None:
    images = torch.randn(5, 1, 8, 8)
    expected = checkpoint.build_gated().eval()(images)
    limit = 1e-5 * expected.abs().max().item() if folded else 0.0
    torch.testing.assert_close(eps_compact.load(path)(images), expected, rtol=0, atol=limit)


# -- what it does ----------------------------------------------------------------------------------


def test_from_checkpoint_to_compact_network(folder: Path) -> None:
    result = compact(folder, "ckpt.pt")
    assert result.code == 0, result.stderr
    assert result.stdout == ""
    assert sorted(files_in(folder)) == ["ckpt.pt", "compact.json", "compact.png", "compact.pt"]
    checkpoint = Checkpoint.load(folder / "ckpt.pt")
    artifact = CompactArtifact.load(folder / "compact.pt")
    assert artifact.network.removed == DEAD
    assert artifact.checkpoint == {"path": "ckpt.pt", "digest": checkpoint.digest}
    assert artifact.data == checkpoint.data
    assert [entry["block"] for entry in artifact.certificate["removed"]] == list(DEAD)
    assert_same_answers(folder / "compact.pt", checkpoint)
    with Image.open(folder / "compact.png") as image:
        assert image.format == "PNG"


def test_what_it_says(folder: Path) -> None:
    said = compact(folder, "ckpt.pt").stderr
    for words in (
        "blocks",
        "17,254",  # parameters before
        "FLOPs an image",
        "▒·▒ ·▒▒ ▒··",
        "Live blocks nearest to being pruned (143 held-out images)",
        "all logits equal (torch.equal, float32)",
        "batches 1, 7, 32",
        "folded: 6 batch norms into convolutions",
        "5 live gates closed on steps of the last epoch: kept as plain additions",
        "written: compact.pt, compact.json, compact.png",
    ):
        assert words in said, words


def test_json_is_the_last_thing_on_stdout(folder: Path) -> None:
    result = compact(folder, "ckpt.pt", "--json")
    summary = json.loads(result.stdout)
    assert summary["passed"] is True
    assert summary["removed"] == list(DEAD)
    assert summary["blocks"] == {"before": 9, "after": 5}
    assert summary["parameters"]["before"] == 17_254
    assert summary["folding"]["parameters"] == sum(
        parameter.numel() for parameter in eps_compact.load(folder / "compact.pt").parameters()
    )
    assert summary["flops"]["after"] < summary["flops"]["before"]
    assert summary["written"] == {
        "compact": "compact.pt",
        "certificate": "compact.json",
        "picture": "compact.png",
    }
    assert {entry["batch"] for entry in summary["proof"]} == {1, 7, 32}
    assert len(summary["live"]) == 5


def test_beside_the_checkpoint_wherever_it_is_called_from(folder: Path) -> None:
    run_folder = folder / "runs" / "one"
    run_folder.mkdir(parents=True)
    (folder / "ckpt.pt").rename(run_folder / "ckpt.pt")
    assert compact(folder, "runs/one/ckpt.pt").code == 0
    assert CompactArtifact.load(run_folder / "compact.pt").checkpoint["path"] == "ckpt.pt"


def test_output_elsewhere_still_finds_its_checkpoint(folder: Path) -> None:
    assert compact(folder, "ckpt.pt", "-o", "new/place/small.pt").code == 0
    made = [f"new/place/small.{ending}" for ending in ("json", "png", "pt")]
    assert sorted(files_in(folder)) == ["ckpt.pt", *made]
    artifact = CompactArtifact.load(folder / "new/place/small.pt")
    assert artifact.checkpoint["path"] == "../../ckpt.pt"


def test_dry_run_shows_everything_and_writes_nothing(folder: Path) -> None:
    before = files_in(folder)
    result = compact(folder, "ckpt.pt", "--dry-run", "--json")
    assert result.code == 0
    assert files_in(folder) == before
    assert "all logits equal" in result.stderr
    assert "nothing was written" in result.stderr
    assert json.loads(result.stdout)["written"] is None


def test_last_pt_is_a_checkpoint_too(folder: Path) -> None:
    checkpoint = replace(Checkpoint.load(folder / "ckpt.pt"), resume={"epoch": 3})
    checkpoint.save(folder / "last.pt")
    assert compact(folder, "last.pt").code == 0
    assert_same_answers(folder / "compact.pt", checkpoint)


@pytest.mark.parametrize(
    "dead", [BLOCKS, ("stages.1.0", "stages.2.0"), ("stages.0.0",)], ids=["all", "firsts", "first"]
)
def test_other_deaths(dead: Sequence[str], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(dead=dead)
    checkpoint.save(tmp_path / "ckpt.pt")
    assert compact(tmp_path, "ckpt.pt").code == 0
    assert CompactArtifact.load(tmp_path / "compact.pt").network.removed == tuple(dead)
    assert_same_answers(tmp_path / "compact.pt", checkpoint)


@pytest.mark.parametrize("gated", [True, False])
def test_nothing_dead_writes_the_same_network(gated: bool, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(gated=gated)
    checkpoint.save(tmp_path / "baseline.pt")
    result = compact(tmp_path, "baseline.pt", "--json")
    assert result.code == 0
    assert "no block is dead" in result.stderr
    counts = json.loads(result.stdout)["parameters"]
    assert counts["before"] == counts["after"] == 17_254
    assert_same_answers(tmp_path / "compact.pt", checkpoint)


def test_force_replaces_an_earlier_result(folder: Path) -> None:
    for name in ("compact.pt", "compact.png", "compact.json"):
        (folder / name).write_text("old")
    assert compact(folder, "ckpt.pt", "--force").code == 0
    assert_same_answers(folder / "compact.pt", Checkpoint.load(folder / "ckpt.pt"))
    assert (folder / "compact.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "compact.json").read_text())["lossless"] is True


def test_unfolded_it_is_equal_to_the_last_bit(folder: Path) -> None:
    assert compact(folder, "ckpt.pt", "--no-fold").code == 0
    artifact = CompactArtifact.load(folder / "compact.pt")
    assert artifact.folded == ()
    assert artifact.certificate["folding"] is None
    assert_same_answers(folder / "compact.pt", Checkpoint.load(folder / "ckpt.pt"), folded=False)


def test_the_certificate_beside_it(folder: Path) -> None:
    assert compact(folder, "ckpt.pt").code == 0
    artifact = CompactArtifact.load(folder / "compact.pt")
    found = json.loads((folder / "compact.json").read_text())
    assert found["artifact"] == artifact.digest
    assert found["checkpoint"] == artifact.checkpoint
    assert found["made_with"] == artifact.versions
    for name, value in artifact.certificate.items():
        if name != "checkpoint":
            assert found[name] == value, name


def test_twice_gives_the_same_bytes(folder: Path) -> None:
    assert compact(folder, "ckpt.pt").code == 0
    once = files_in(folder)
    assert compact(folder, "ckpt.pt", "--force").code == 0
    assert files_in(folder) == once


def test_without_data(folder: Path) -> None:
    checkpoint = Checkpoint.load(folder / "ckpt.pt")
    lost = replace(checkpoint, data=replace(checkpoint.data, name="folder:gone"))
    lost.save(folder / "ckpt.pt")
    refused = compact(folder, "ckpt.pt")
    assert_refused(folder, refused, "or add --no-data")
    result = compact(folder, "ckpt.pt", "--no-data", "--json")
    assert result.code == 0, result.stderr
    assert "no held-out images: the evidence is the training record alone" in result.stderr
    assert "80 random images" in result.stderr
    summary = json.loads(result.stdout)
    assert summary["evidence"] == "training record alone"
    assert summary["flicker"] is None
    assert_same_answers(folder / "compact.pt", checkpoint)


def test_blocks_that_are_closed_often_enough(folder: Path) -> None:
    """Of the live blocks, whose gates are closed on 3 of 20 steps, one was on 12."""
    checkpoint = Checkpoint.load(folder / "ckpt.pt")
    checkpoint.gates = [
        replace(record, closed_steps=12) if record.block == "stages.1.2" else record
        for record in checkpoint.gates
    ]
    checkpoint.save(folder / "ckpt.pt")
    lossless = json.loads(compact(folder, "ckpt.pt", "--closed-at-least", "0.61", "--json").stdout)
    assert lossless["lossless"] is True
    assert lossless["removed"] == list(DEAD)
    options = ("--closed-at-least", "0.6", "--json", "--force")
    result = compact(folder, "ckpt.pt", *options)
    assert result.code == 0, result.stderr
    assert "NOT lossless: 1 live block removed: stages.1.2 (60%)" in result.stderr
    assert "held-out images: " in result.stderr
    assert "with the same gates closed" in result.stderr
    summary = json.loads(result.stdout)
    assert summary["lossless"] is False
    assert summary["removed"] == sorted([*DEAD, "stages.1.2"])
    assert [entry["block"] for entry in summary["removed_live"]] == ["stages.1.2"]
    assert summary["removed_live"][0]["closed"] == 0.6
    assert summary["accuracy"].keys() == {"before", "after", "samples"}
    assert summary["blocks"] == {"before": 9, "after": 4}
    # The network is that of a checkpoint in which the block had died.
    checkpoint.gates = [
        replace(record, death=checkpoint.gates[1].death) if record.block == "stages.1.2" else record
        for record in checkpoint.gates
    ]
    assert_same_answers(folder / "compact.pt", checkpoint)
    assert CompactArtifact.load(folder / "compact.pt").certificate["lossless"] is False
    assert json.loads((folder / "compact.json").read_text())["lossless"] is False


# -- what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compact.pt", "compact.png", "compact.json"])
def test_existing_output_is_refused_before_any_work(folder: Path, name: str) -> None:
    (folder / "ckpt.pt").write_bytes(b"not even looked at")
    (folder / name).write_text("precious")
    before = files_in(folder)
    result = compact(folder, "ckpt.pt")
    assert result.code == 1
    assert result.error == (
        f"eps-compact: error: {name}: exists already; choose another place or add --force"
    )
    assert files_in(folder) == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("ckpt.pt", "would overwrite the checkpoint"),
        ("./sub/../ckpt.pt", "would overwrite the checkpoint"),
        ("map.png", ".png is the block map's name; end it in .pt"),
        ("map.json", ".json is the certificate's name; end it in .pt"),
        ("sub", "sub: is a folder; name a file with -o"),
        ("ckpt.pt/x.pt", "ckpt.pt is a file, not a folder"),
    ],
)
def test_impossible_outputs(folder: Path, output: str, message: str) -> None:
    (folder / "sub").mkdir()
    before = files_in(folder)
    result = compact(folder, "ckpt.pt", "-o", output, "--force")
    assert_refused(folder, result, message)
    assert files_in(folder) == before


def test_missing_checkpoint_and_folder(folder: Path) -> None:
    assert_refused(folder, compact(folder, "none.pt"), "error: none.pt: no such file")
    assert_refused(folder, compact(folder, "."), "error: .: is a folder, not a file")


def test_a_missing_checkpoint_is_said_before_an_existing_output(folder: Path) -> None:
    (folder / "compact.pt").write_text("precious")
    result = compact(folder, "none.pt")
    assert (result.code, result.error) == (1, "eps-compact: error: none.pt: no such file")


def test_damaged_checkpoints(folder: Path) -> None:
    whole, chance = (folder / "ckpt.pt").read_bytes(), random.Random(0)
    for attempt in range(20):
        content = bytearray(whole)
        if attempt % 2:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            del content[chance.randrange(len(content)) :]
        (folder / "ckpt.pt").write_bytes(content)
        assert_refused(folder, compact(folder, "ckpt.pt"), "ckpt.pt: damaged, truncated")


def test_foreign_and_too_new_checkpoints(folder: Path) -> None:
    torch.save({"state_dict": {}}, folder / "foreign.pt")
    assert_refused(folder, compact(folder, "foreign.pt"), "not an eps-resnet file")
    payload, _ = checksummed.read(folder / "ckpt.pt", format=FORMAT, version=VERSION)
    checksummed.write(folder / "new.pt", {**payload, "version": VERSION + 1})
    assert_refused(folder, compact(folder, "new.pt"), "upgrade eps-resnet")


def test_compacting_a_compact_network(folder: Path) -> None:
    assert compact(folder, "ckpt.pt", "-o", "once.pt").code == 0
    result = compact(folder, "once.pt")
    assert_refused(
        folder, result, "expected an eps-resnet-checkpoint file, found eps-resnet-compact"
    )


def test_tensors_that_do_not_fit_name_the_file(folder: Path) -> None:
    checkpoint = Checkpoint.load(folder / "ckpt.pt")
    del checkpoint.state["classifier.bias"]
    checkpoint.save(folder / "ckpt.pt")
    assert_refused(folder, compact(folder, "ckpt.pt"), "ckpt.pt: tensors are missing")


def test_another_data_set(folder: Path) -> None:
    checkpoint = Checkpoint.load(folder / "ckpt.pt")
    changes: dict[str, dict[str, Any]] = {
        "not the images that the checkpoint was trained on": {"sha256": "0" * 64, "digests": {}},
        "its test images are not those that the checkpoint was tested on": {"sha256": "0" * 64},
        "elsewhere: unknown": {"name": "elsewhere"},
    }
    for message, change in changes.items():
        other = replace(checkpoint, data=replace(checkpoint.data, **change))
        other.save(folder / "ckpt.pt")
        assert_refused(folder, compact(folder, "ckpt.pt"), message)


def test_no_data_from_somewhere(folder: Path) -> None:
    result = compact(folder, "ckpt.pt", "--no-data", "--data-root", ".")
    assert_refused(folder, result, "--no-data: looks at no images; leave out --data-root")


@pytest.mark.parametrize(
    "args",
    [
        ["ckpt.pt", "--frobnicate"],
        [],
        ["ckpt.pt", "two.pt"],
        ["ckpt.pt", "--closed-at-least", "0"],
        ["ckpt.pt", "--closed-at-least", "1.1"],
    ],
)
def test_usage(folder: Path, args: list[str]) -> None:
    assert compact(folder, *args).code == 2
    assert sorted(files_in(folder)) == ["ckpt.pt"]


# -- when the proof fails --------------------------------------------------------------------------


COMPACT = eps_compact.compact


def shifted(model: nn.Module, dead: object = None) -> fx.GraphModule:
    """A compaction with a mistake in it."""
    plain = COMPACT(model)
    plain.state_dict()["classifier.bias"].add_(0.25)
    return plain


def test_failed_proof_writes_nothing_and_ends_with_3(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eps_compact.compaction.compact", shifted)
    result = compact(folder, "ckpt.pt")
    assert_refused(folder, result, "on held-out images at batch 1 (by up to 0.25", code=3)
    assert result.error.endswith("nothing was written")
    failed = compact(folder, "ckpt.pt", "--json")
    assert failed.code == 3
    summary = json.loads(failed.stdout)
    assert summary["passed"] is False
    assert "batch 1" in summary["error"]


def test_a_death_without_evidence_ends_with_3(folder: Path) -> None:
    checkpoint = Checkpoint.load(folder / "ckpt.pt")
    checkpoint.gates = [
        replace(record, death=replace(record.death, heldout_peak=9.0)) if record.death else record
        for record in checkpoint.gates
    ]
    checkpoint.save(folder / "ckpt.pt")
    message = "block stages.0.1: its record does not show it dead"
    assert_refused(folder, compact(folder, "ckpt.pt"), message, code=3)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("full_from", "name"), [(1, "compact.pt"), (3, "compact.json"), (5, "compact.png")]
)
def test_a_full_disk_leaves_all_as_it_was(
    full_from: int, name: str, earlier: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three files are written, each flushed and then its folder."""
    fsync, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) >= full_from:
            raise OSError(28, "No space left on device")
        fsync(handle)

    if earlier:
        for ending in ("pt", "json", "png"):
            (folder / f"compact.{ending}").write_text("earlier")
    before = files_in(folder)
    monkeypatch.setattr("os.fsync", full)
    message = f"{name}: No space left on device; free some space, or choose another place"
    assert compact(folder, "ckpt.pt", "--force").error == f"eps-compact: error: {message}"
    assert files_in(folder) == before


def test_a_plot_that_cannot_be_drawn_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eps_compact.plots.draw_blocks", draw_blocks)  # not the tests' own
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_refused(folder, compact(folder, "ckpt.pt"), "pip install 'eps-resnet[train]'")


# -- as a program ----------------------------------------------------------------------------------

PROGRAM = [sys.executable, "-c", "import sys; sys.argv[0] = 'eps-compact'; import eps_compact.cli"]
PROGRAM[-1] += "; eps_compact.cli.main()"


def test_as_a_program(folder: Path) -> None:
    done = subprocess.run(
        [*PROGRAM, "ckpt.pt", "--json"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
    again = subprocess.run(
        [*PROGRAM, "ckpt.pt"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert again.stdout == ""
    assert again.stderr == (
        "eps-compact: error: compact.pt: exists already; choose another place or add --force\n"
    )
