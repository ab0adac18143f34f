"""Compaction of a user's network from memory, and of the file that the pruner writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import eps_compact
from eps_compact.cli import main
from eps_core.errors import DataError
from eps_deploy.cli.verify import main as verify
from eps_train.gating.pruner import BlockPruner
from tests.commands import run
from tests.train.loops import EXAMPLE, HELDOUT, SHUT, SubsetPruner, own_net, pruned


@pytest.fixture(scope="module")
def pruner() -> BlockPruner:
    return pruned()


@pytest.mark.parametrize("folding", [True, False])
def test_the_plain_network_and_its_certificate(pruner: BlockPruner, folding: bool) -> None:
    done = eps_compact.compact_pruner(pruner, iter(HELDOUT), folding=folding)
    plain = done.build()
    expected = pruner.model.eval()(EXAMPLE)
    found = plain(EXAMPLE)
    assert torch.allclose(found, expected, atol=1e-5) if folding else torch.equal(found, expected)
    assert done.certificate["lossless"]
    assert done.certificate["heldout"] == 16
    assert [entry["block"] for entry in done.certificate["removed"]] == ["blocks.1"]
    assert done.counts["blocks"] == {"before": 3, "after": 2}
    assert all(proof.passed for proof in done.proofs)
    assert done.artifact.data.classes == tuple("abcdefghij")
    images = torch.cat([images for images, _ in HELDOUT])
    blocks = {block.block: block.peak for block in done.statistics.live}
    assert len(images) == done.statistics.images
    assert blocks.keys() == {"blocks.0", "blocks.2"}


def test_training_on_leaves_the_compact_network_alone(pruner: BlockPruner) -> None:
    done = eps_compact.compact_pruner(pruner)
    before = done.build()(EXAMPLE)
    with torch.no_grad():
        pruner.model.get_parameter("head.bias").add_(1.0)
    assert torch.equal(done.build()(EXAMPLE), before)


def test_the_artifact_can_be_written_and_verified(pruner: BlockPruner, tmp_path: Path) -> None:
    done = eps_compact.compact_pruner(pruner)
    done.artifact.save(tmp_path / "compact.pt")
    assert torch.equal(eps_compact.load(tmp_path / "compact.pt")(EXAMPLE), done.build()(EXAMPLE))


@pytest.mark.parametrize(
    ("heldout", "message"),
    [
        ([], "heldout: yields no batch"),
        ([(EXAMPLE - 0.5) / 0.2], r"its pixels are -2\.50 to 2\.50, not 0 to 1"),
    ],
)
def test_held_out_data_that_cannot_be_used(
    pruner: BlockPruner, heldout: list[torch.Tensor], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        eps_compact.compact_pruner(pruner, heldout)


def test_normalised_inputs_become_the_images_that_they_were() -> None:
    made = SubsetPruner(own_net(), example=EXAMPLE, epsilon=SHUT, mean=0.5, std=0.2)
    done = eps_compact.compact_pruner(made, [(EXAMPLE - 0.5) / 0.2])
    assert done.artifact.data.mean == (127.5,)
    assert done.certificate["heldout"] == 8


def test_a_saved_network_is_compacted_and_verified(pruner: BlockPruner, tmp_path: Path) -> None:
    pruner.save(tmp_path / "ckpt.pt", network="tests.train.loops:OwnNet")
    refused = run("eps-compact", main, "ckpt.pt", cwd=tmp_path)
    assert refused.code == 1
    assert "BlockPruner.save(..., data=); or add --no-data" in refused.stderr
    done = run("eps-compact", main, "ckpt.pt", "--no-data", cwd=tmp_path)
    assert done.code == 0, done.stderr
    checked = run("eps-verify", verify, "compact.pt", cwd=tmp_path)
    assert checked.code == 0, checked.stderr
    plain = eps_compact.load(tmp_path / "compact.pt")
    assert torch.allclose(plain(EXAMPLE), pruner.model.eval()(EXAMPLE), atol=1e-5)
