"""The input files of a deployment: found beside the compact network; others are refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from eps_compact import CompactArtifact
from eps_core.errors import ConfigError, FileFormatError
from eps_deploy.pipeline.inputs import find_inputs
from eps_train.training.checkpoint import Checkpoint
from tests.checkpoints import make_checkpoint
from tests.deploy.conftest import DEAD, DEPTH


def test_all_is_found_beside_the_compact_network(workshop: Path) -> None:
    found = find_inputs(workshop / "compact.pt")
    assert found.checkpoint.dead == DEAD
    assert found.compact.checkpoint["digest"] == found.checkpoint.digest
    assert found.baseline is not None
    assert found.baseline_path == workshop / "baseline.pt"


def test_a_compact_network_written_elsewhere_finds_its_way(workshop: Path, tmp_path: Path) -> None:
    """`eps-compact run/ckpt.pt -o shipped/compact.pt`: baseline.pt lies beside the checkpoint."""
    artifact = CompactArtifact.load(workshop / "compact.pt")
    artifact.checkpoint = {**artifact.checkpoint, "path": "../workshop/ckpt.pt"}
    (tmp_path / "shipped").mkdir()
    artifact.save(tmp_path / "shipped" / "compact.pt")
    found = find_inputs(tmp_path / "shipped" / "compact.pt")
    assert found.baseline_path is not None
    assert found.baseline_path.resolve() == (workshop / "baseline.pt").resolve()


def test_without_a_baseline(workshop: Path) -> None:
    (workshop / "baseline.pt").unlink()
    assert find_inputs(workshop / "compact.pt").baseline is None


def test_a_moved_checkpoint_is_asked_for_and_accepted(workshop: Path) -> None:
    (workshop / "ckpt.pt").rename(workshop / "moved.pt")
    with pytest.raises(ConfigError, match=r"ckpt\.pt.* is not there; name it with --checkpoint"):
        find_inputs(workshop / "compact.pt")
    found = find_inputs(workshop / "compact.pt", checkpoint=workshop / "moved.pt")
    assert found.checkpoint.dead == DEAD


def test_another_checkpoint_is_refused(workshop: Path) -> None:
    make_checkpoint(depth=DEPTH, dead=DEAD, seed=5).save(workshop / "ckpt.pt")
    with pytest.raises(ConfigError, match=r"not the checkpoint that .*--checkpoint"):
        find_inputs(workshop / "compact.pt")


@pytest.mark.parametrize("name", ["compact.pt", "ckpt.pt", "baseline.pt"])
def test_damaged_files_are_refused_by_name(workshop: Path, name: str) -> None:
    content = bytearray((workshop / name).read_bytes())
    content[len(content) // 2] ^= 4
    (workshop / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=f"{name}: damaged"):
        find_inputs(workshop / "compact.pt")


def test_missing_files_that_were_named_are_refused(workshop: Path) -> None:
    nowhere = workshop / "nowhere.pt"
    for arguments in ({"checkpoint": nowhere}, {"baseline": nowhere}):
        with pytest.raises(FileFormatError, match=r"nowhere\.pt: no such file"):
            find_inputs(workshop / "compact.pt", **arguments)
    with pytest.raises(FileFormatError, match=r"nowhere\.pt: no such file"):
        find_inputs(nowhere)


def test_a_checkpoint_is_no_compact_network_and_the_other_way_round(workshop: Path) -> None:
    with pytest.raises(FileFormatError, match="expected an eps-resnet-compact file"):
        find_inputs(workshop / "ckpt.pt")
    with pytest.raises(FileFormatError, match="expected an eps-resnet-checkpoint file"):
        find_inputs(workshop / "compact.pt", baseline=workshop / "compact.pt")


def test_a_gated_network_is_no_baseline(workshop: Path) -> None:
    with pytest.raises(ConfigError, match=r"has ε-gates.*--baseline"):
        find_inputs(workshop / "compact.pt", baseline=workshop / "ckpt.pt")


def test_a_baseline_of_another_depth_is_refused(workshop: Path) -> None:
    make_checkpoint(depth=8, gated=False).save(workshop / "baseline.pt")
    with pytest.raises(ConfigError, match=r"depth 8, .*depth 14, .*--baseline"):
        find_inputs(workshop / "compact.pt")


def test_a_baseline_of_other_data_is_refused(workshop: Path) -> None:
    baseline = Checkpoint.load(workshop / "baseline.pt")
    baseline.data = replace(baseline.data, sha256="0" * 64)
    baseline.save(workshop / "baseline.pt")
    with pytest.raises(ConfigError, match="trained on other images"):
        find_inputs(workshop / "compact.pt")


def test_the_baseline_that_was_named_is_taken(workshop: Path) -> None:
    shutil.copy(workshop / "baseline.pt", workshop / "other.pt")
    (workshop / "baseline.pt").write_bytes(b"not looked at")
    found = find_inputs(workshop / "compact.pt", baseline=workshop / "other.pt")
    assert found.baseline_path == workshop / "other.pt"


def test_a_broken_link_to_the_baseline_is_not_passed_over(workshop: Path) -> None:
    (workshop / "baseline.pt").unlink()
    (workshop / "baseline.pt").symlink_to("nowhere.pt")
    with pytest.raises(FileFormatError, match=r"baseline\.pt: no such file"):
        find_inputs(workshop / "compact.pt")
