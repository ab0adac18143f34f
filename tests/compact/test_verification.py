"""`eps-verify`: what was proven is proven again, and whatever was altered is found."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eps_compact.artifact import FORMAT, VERSION, CompactArtifact
from eps_compact.cli import main as compact_main
from eps_core import checksummed
from eps_deploy.cli.verify import main
from eps_train.gating.folding import fold
from eps_train.training.checkpoint import Checkpoint
from tests.checkpoints import make_checkpoint
from tests.commands import Result, run

DEAD = ("stages.0.1", "stages.2.0")
ALL = (
    *("artifact", "code", "certificate", "checkpoint", "data", "network", "evidence"),
    *("tensors", "rewriting", "folding", "counts"),
)


def compact(folder: Path, *args: object) -> None:
    result = run("eps-compact", compact_main, "ckpt.pt", *args, cwd=folder)
    assert result.code == 0, result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(dead=DEAD, depth=14).save(folder / "ckpt.pt")
    compact(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


def verify(folder: Path, *args: object) -> Result:
    return run("eps-verify", main, *(args or ["compact.pt"]), cwd=folder)


def results(result: Result) -> dict[str, bool | None]:
    return {check["name"]: check["passed"] for check in json.loads(result.stdout)["checks"]}


def alter(folder: Path, **changes: Any) -> None:
    """Write the artifact anew, sealed, with parts of its payload changed; its certificate goes."""
    payload, _ = checksummed.read(folder / "compact.pt", format=FORMAT, version=VERSION)
    checksummed.write(folder / "compact.pt", {**payload, **changes})
    (folder / "compact.json").unlink(missing_ok=True)


def assert_fails(folder: Path, name: str, detail: str) -> None:
    result = verify(folder, "compact.pt", "--json")
    assert result.code == 3, result.stderr
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks[name]["passed"] is False
    assert detail in checks[name]["detail"]
    assert f"FAILED: {name}" in result.stderr or f", {name}" in result.stderr


# -- what passes -----------------------------------------------------------------------------------


def test_all_is_proven_again(folder: Path) -> None:
    result = verify(folder, "compact.pt", "--json")
    assert result.code == 0, result.stderr
    assert results(result) == dict.fromkeys(ALL, True)
    summary = json.loads(result.stdout)
    assert summary["passed"] is True
    assert summary["lossless"] is True
    said = " ".join(result.stderr.split())
    for words in ("143 held-out images", "2 dead blocks", "torch.equal", "limit 1e-05", "FLOPs"):
        assert words in said, words
    assert said.endswith("passed")


def test_elsewhere_from_two_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.move(folder / "compact.pt", tmp_path / "other" / "small.pt")
    shutil.move(folder / "ckpt.pt", tmp_path / "trained.pt")
    alone = verify(tmp_path, "other/small.pt")
    assert alone.code == 1
    assert alone.error.startswith(
        "eps-verify: error: other/ckpt.pt: the checkpoint that other/small"
    )
    result = verify(tmp_path, "other/small.pt", "--checkpoint", "trained.pt", "--json")
    assert result.code == 0
    assert results(result) == {**dict.fromkeys(ALL, True), "certificate": None}


def test_without_data_and_without_folding(folder: Path) -> None:
    compact(folder, "--force", "--no-fold")
    result = verify(folder, "compact.pt", "--no-data", "--json")
    assert result.code == 0
    assert results(result) == {**dict.fromkeys(ALL, True), "data": None, "folding": None}
    assert "--no-data: random images only" in " ".join(result.stderr.split())
    assert "held-out images and" not in result.stderr


def test_data_that_is_not_here(folder: Path) -> None:
    checkpoint = Checkpoint.load(folder / "ckpt.pt")
    replace(checkpoint, data=replace(checkpoint.data, name="folder:gone")).save(folder / "ckpt.pt")
    compact(folder, "--force", "--no-data")
    result = verify(folder, "compact.pt", "--json")
    assert result.code == 0
    assert results(result)["data"] is None
    assert "random images only: " in " ".join(result.stderr.split())
    named = verify(folder, "compact.pt", "--data-root", "nowhere")
    assert named.code == 1
    assert "nowhere" in named.error


def test_what_is_not_lossless_says_so(folder: Path) -> None:
    compact(folder, "--force", "--closed-at-least", "0.1")
    result = verify(folder, "compact.pt", "--json")
    assert result.code == 0
    assert json.loads(result.stdout)["lossless"] is False
    assert "NOT lossless: besides the dead blocks, 4 live ones" in " ".join(result.stderr.split())


def test_nothing_dead_and_all_dead(tmp_path: Path) -> None:
    every = tuple(f"stages.{stage}.0" for stage in range(3))
    for dead in ((), every):
        make_checkpoint(dead=dead, depth=8).save(tmp_path / "ckpt.pt")
        compact(tmp_path, "--force")
        assert verify(tmp_path).code == 0


# -- what does not ---------------------------------------------------------------------------------


def test_the_checkpoint_of_another_network(folder: Path) -> None:
    make_checkpoint(dead=DEAD, depth=14, seed=1).save(folder / "other.pt")
    result = verify(folder, "compact.pt", "--checkpoint", "other.pt", "--json")
    assert result.code == 3
    assert results(result)["checkpoint"] is False
    assert results(result)["rewriting"] is None
    assert "made from another checkpoint" in " ".join(result.stderr.split())


def test_a_certificate_that_belongs_to_another_file(folder: Path) -> None:
    content = json.loads((folder / "compact.json").read_text())
    (folder / "compact.json").write_text(json.dumps({**content, "lossless": False}))
    assert_fails(folder, "certificate", "differs from the artifact's certificate")
    (folder / "compact.json").write_text(json.dumps({**content, "artifact": "0" * 64}))
    assert_fails(folder, "certificate", "belongs to 000000000000")
    (folder / "compact.json").write_text("{}")
    assert "is no certificate of eps-compact" in verify(folder).error
    (folder / "compact.json").write_text("{")
    assert "is not JSON" in verify(folder).error


def test_one_number_altered(folder: Path) -> None:
    state = CompactArtifact.load(folder / "compact.pt").state
    state["classifier.bias"][0] += 1e-4
    alter(folder, state=state)
    result = verify(folder, "compact.pt", "--json")
    assert result.code == 3
    found = results(result)
    assert found["tensors"] is False
    assert found["folding"] is False
    assert found["rewriting"] is True


def test_one_number_altered_in_an_unfolded_network(folder: Path) -> None:
    compact(folder, "--force", "--no-fold")
    state = CompactArtifact.load(folder / "compact.pt").state
    state["classifier.bias"][0] += 1e-4
    alter(folder, state=state)
    assert_fails(folder, "rewriting", "differs from the gated one on held-out images at batch 1")


def another_block(artifact: CompactArtifact) -> dict[str, Any]:
    """A network in which a live block is gone too, proven by nobody."""
    network = replace(artifact.network, removed=(*artifact.network.removed, "stages.1.1"))
    checkpoint = make_checkpoint(dead=network.removed, depth=14)
    from eps_compact import compact

    folded, pairs = fold(compact(checkpoint.build_gated()))
    return {
        "network": network.to_dict(),
        "state": dict(folded.state_dict()),
        "folded": [list(pair) for pair in pairs],
    }


def other_evidence(artifact: CompactArtifact) -> dict[str, Any]:
    removed = [{**entry, "peak": 0.1} for entry in artifact.certificate["removed"]]
    return {"certificate": {**artifact.certificate, "removed": removed}}


def other_counts(artifact: CompactArtifact) -> dict[str, Any]:
    counts = artifact.certificate["counts"]
    smaller = {**counts, "flops": {"before": counts["flops"]["before"], "after": 1}}
    return {"certificate": {**artifact.certificate, "counts": smaller}}


def lossy(artifact: CompactArtifact) -> dict[str, Any]:
    return {"certificate": {**artifact.certificate, "lossless": False}}


def other_data(artifact: CompactArtifact) -> dict[str, Any]:
    return {"data": replace(artifact.data, sha256="0" * 64).to_dict()}


@pytest.mark.parametrize(
    ("change", "name", "detail"),
    [
        (another_block, "network", "removed without a reason: stages.1.1"),
        (other_evidence, "evidence", "other dead blocks than the checkpoint"),
        (other_counts, "counts", "wrong about flops"),
        (lossy, "network", "wrong about being lossless"),
        (other_data, "data", "different data"),
    ],
)
def test_forgeries(
    change: Callable[[CompactArtifact], dict[str, Any]], name: str, detail: str, folder: Path
) -> None:
    alter(folder, **change(CompactArtifact.load(folder / "compact.pt")))
    assert_fails(folder, name, detail)


def test_a_checkpoint_whose_record_shows_no_death(folder: Path) -> None:
    checkpoint = Checkpoint.load(folder / "ckpt.pt")
    checkpoint.gates = [
        replace(record, death=replace(record.death, heldout_peak=9.0)) if record.death else record
        for record in checkpoint.gates
    ]
    digest = checkpoint.save(folder / "ckpt.pt")
    artifact = CompactArtifact.load(folder / "compact.pt")
    alter(
        folder,
        checkpoint={"path": "ckpt.pt", "digest": digest},
        certificate={**artifact.certificate, "checkpoint": digest},
    )
    assert_fails(folder, "evidence", "its record does not show it dead")


def test_damage(folder: Path) -> None:
    whole, chance = (folder / "compact.pt").read_bytes(), random.Random(0)
    damaged = []
    for bit in chance.sample(range(8 * len(whole)), 5):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(content))
    damaged += [whole[:length] for length in chance.sample(range(len(whole)), 5)]
    for broken in damaged:
        (folder / "compact.pt").write_bytes(broken)
        result = verify(folder)
        assert result.code == 1
        assert "compact.pt: damaged" in result.error
        assert "Traceback" not in result.stderr


def test_what_is_no_compact_network(folder: Path) -> None:
    assert "expected an eps-resnet-compact file" in verify(folder, "ckpt.pt").error
    assert "no such file" in verify(folder, "none.pt").error
    refused = verify(folder, "compact.pt", "--checkpoint", "compact.pt")
    assert "expected an eps-resnet-checkpoint file" in refused.error
    assert (
        "looks at no images" in verify(folder, "compact.pt", "--no-data", "--data-root", ".").error
    )
    assert verify(folder, "compact.pt", "--frobnicate").code == 2


def test_files_from_before_folding(folder: Path) -> None:
    """Version 1: no `folded`, and a certificate that knew less."""
    compact(folder, "--force", "--no-fold")
    certificate = CompactArtifact.load(folder / "compact.pt").certificate
    old = ("removed", "live", "counts", "data", "checkpoint", "versions", "proof")
    alter(folder, certificate={name: certificate[name] for name in old}, version=1)
    payload, _ = checksummed.read(folder / "compact.pt", format=FORMAT, version=VERSION)
    del payload["folded"]
    checksummed.write(folder / "compact.pt", payload)
    result = verify(folder, "compact.pt", "--json")
    assert result.code == 0, result.stderr
    untold = dict.fromkeys(("code", "certificate", "folding"))
    assert results(result) == {**dict.fromkeys(ALL, True), **untold}
