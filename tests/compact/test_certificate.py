"""The proof finds every difference, and the certificate says what was proven."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from eps_compact import ProofError, compact
from eps_compact.certificate import check_evidence, prove
from eps_compact.compaction import Compaction, compact_checkpoint, proof_images
from eps_train.data import dataset
from eps_train.data.images import ImageSet
from eps_train.gating.folding import fold
from eps_train.models.resnets import Normalize
from eps_train.training.checkpoint import Checkpoint
from tests.checkpoints import EPSILON, make_checkpoint

DEAD = ("stages.0.1", "stages.1.0", "stages.2.2")


@pytest.fixture(scope="module")
def heldout() -> Tensor:
    return dataset.load("digits").validation.images


@pytest.fixture(scope="module")
def made() -> Checkpoint:
    return make_checkpoint(dead=DEAD)


@pytest.fixture(scope="module")
def compaction(made: Checkpoint, heldout: Tensor) -> Compaction:
    return compact_checkpoint(replace(made, digest="d" * 64), heldout, checkpoint_path="ckpt.pt")


def normalize() -> Normalize:
    identity = dataset.load("digits").identity
    return Normalize.of(identity)


def networks(made: Checkpoint) -> tuple[fx.GraphModule, fx.GraphModule]:
    gated = made.build_gated()
    return gated, compact(gated)


def test_the_proof_covers_all_batches_and_both_kinds_of_input(
    made: Checkpoint, heldout: Tensor
) -> None:
    gated, plain = networks(made)
    proofs = prove([gated, plain], normalize(), heldout)
    assert [(proof.inputs, proof.worst_batch) for proof in proofs] == [
        (inputs, size)
        for size in (1, 7, 32)
        for inputs in ("held-out images", "random uint8 images")
    ]
    assert all(proof.passed and proof.max_abs == 0 for proof in proofs)
    assert all(proof.samples >= proof.worst_batch for proof in proofs)
    assert gated.training, "the mode is left as it was"


def test_it_needs_one_image_only(made: Checkpoint, heldout: Tensor) -> None:
    assert prove(networks(made), normalize(), heldout[:1])


def test_one_flipped_last_bit_is_found(made: Checkpoint, heldout: Tensor) -> None:
    gated, plain = networks(made)
    bias = plain.state_dict()["classifier.bias"]
    bias[3] = torch.nextafter(torch.tensor(1e-6), torch.tensor(1.0))
    with pytest.raises(ProofError, match=r"on held-out images at batch 1 \(by up to [0-9.e-]+\)"):
        prove([gated, plain], normalize(), heldout)


def test_the_largest_difference_is_named(made: Checkpoint, heldout: Tensor) -> None:
    gated, plain = networks(made)
    plain.state_dict()["classifier.bias"][7] += 0.5
    with pytest.raises(ProofError, match=r"by up to 0\.5(0000\d+)?\)"):
        prove([gated, plain], normalize(), heldout)


def test_a_difference_on_random_images_alone_is_found(made: Checkpoint, heldout: Tensor) -> None:
    gated, plain = networks(made)
    # Black images hide a stem that sees twice as much; random ones do not.
    black = torch.zeros_like(heldout)
    plain.state_dict()["stem.0.weight"].mul_(2)
    identity = Normalize([0.0], [1.0])
    with pytest.raises(ProofError, match="on random uint8 images at batch 1"):
        prove([gated, plain], identity, black)


def test_nan_is_no_equality(made: Checkpoint, heldout: Tensor) -> None:
    """A dead branch that is not finite shows through the shut gate: 0 times infinity."""
    state = {name: tensor.clone() for name, tensor in made.state.items()}
    state[f"{DEAD[0]}.conv2.weight"].fill_(float("inf"))
    gated, plain = networks(replace(made, state=state))
    with pytest.raises(ProofError, match="logits that are not finite"):
        prove([gated, plain], normalize(), heldout)


@pytest.mark.parametrize(
    "change",
    [
        {"peak": EPSILON * 1.01},
        {"heldout_peak": EPSILON * 1.01},
        {"peak": float("nan")},
        {"steps": 0},
        {"samples": 0},
    ],
)
def test_evidence_that_shows_no_death(made: Checkpoint, change: dict[str, Any]) -> None:
    check_evidence(made)
    gates = [
        replace(record, death=replace(record.death, **change))
        if record.block == DEAD[1] and record.death is not None
        else record
        for record in made.gates
    ]
    with pytest.raises(ProofError, match=r"^block stages\.1\.0: its record does not show it dead"):
        check_evidence(replace(made, gates=gates))


def test_certificate_holds_the_evidence(compaction: Compaction, made: Checkpoint) -> None:
    found = compaction.artifact.certificate
    assert [entry["block"] for entry in found["removed"]] == list(DEAD)
    assert found["removed"][0] == {
        "block": "stages.0.1",
        "epoch": 9,
        "epsilon": EPSILON,
        "steps": 60,
        "peak": 1.25,
        "heldout_peak": 1.0,
        "samples": made.data.sizes["validation"],
    }
    assert found["checkpoint"] == "d" * 64
    assert found["data"] == {
        "name": "digits",
        "sha256": made.data.sha256,
        "split_seed": made.data.split_seed,
        "sizes": dict(made.data.sizes),
    }
    assert found["versions"] == made.versions
    assert found["lossless"] is True
    assert found["removed_live"] == []
    assert found["evidence"] == "training record and held-out images"
    assert found["made_with"]["eps_resnet"] == version("eps-resnet")


def test_certificate_holds_the_proof_and_the_living(compaction: Compaction) -> None:
    found = compaction.artifact.certificate
    assert len(found["proof"]) == 6
    assert all(entry["equal"] is True and entry["max_abs"] == 0 for entry in found["proof"])
    assert [entry["block"] for entry in found["live"]] == [
        f"stages.{stage}.{block}"
        for stage in range(3)
        for block in range(3)
        if f"stages.{stage}.{block}" not in DEAD
    ]
    assert all(entry["ratio"] == entry["peak"] / EPSILON for entry in found["live"])


def test_counts(compaction: Compaction, made: Checkpoint) -> None:
    """Depth 20, width 4, 8x8 grey digits: three removed blocks' parameters and FLOPs by hand."""
    counts = compaction.counts
    assert counts["blocks"] == {"before": 9, "after": 6}
    # Two norms of weights and biases, two 3x3 convolutions, each block.
    gone = (
        (8 + 9 * 4 * 4 + 8 + 9 * 4 * 4)
        + (8 + 9 * 4 * 8 + 16 + 9 * 8 * 8)
        + (32 + 9 * 16 * 16 + 32 + 9 * 16 * 16)
    )
    assert counts["parameters"]["before"] - counts["parameters"]["after"] == gone
    flops = 2 * 9 * (2 * 4 * 4 * 64 + (4 * 8 + 8 * 8) * 16 + 2 * 16 * 16 * 4)
    assert counts["flops"]["before"] - counts["flops"]["after"] == flops
    plain = compact(made.build_gated())
    assert counts["parameters"]["after"] == sum(p.numel() for p in plain.parameters())


def test_what_was_proven_is_what_a_reader_builds(compaction: Compaction, made: Checkpoint) -> None:
    images = torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        expected = made.build_gated().eval()(images)
        found = compaction.artifact.build()(images)
    assert compaction.artifact.folded
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_folding_has_a_proof_of_its_own(compaction: Compaction) -> None:
    folding = compaction.artifact.certificate["folding"]
    assert folding["pairs"] == 1 + 6, "the stem, and one in each block that stays"
    assert folding["bound"] == 1e-5
    assert [(entry["inputs"], entry["batch"]) for entry in folding["proof"]] == [
        (inputs, size)
        for size in (1, 7, 32)
        for inputs in ("held-out images", "random uint8 images")
    ]
    assert all(0 <= entry["relative"] <= 1e-5 for entry in folding["proof"])
    assert any(entry["relative"] > 0 for entry in folding["proof"]), "rounding shows"
    # A batch norm's weight and bias go, a bias comes: one number a channel less.
    saved = compaction.counts["parameters"]["after"] - folding["parameters"]
    assert saved == 4 + 4 + 4 + 8 + 8 + 16 + 16


def test_folding_beyond_its_bound_is_no_proof(made: Checkpoint, heldout: Tensor) -> None:
    gated, plain = networks(made)
    folded, _ = fold(plain)
    assert prove([gated, plain, folded], normalize(), heldout)
    folded.state_dict()["classifier.bias"].add_(1e-3)
    with pytest.raises(
        ProofError, match=r"^folding moves logits by .*more than 1e-05, on held-out"
    ):
        prove([gated, plain, folded], normalize(), heldout)
    folded.state_dict()["classifier.bias"].fill_(float("nan"))
    with pytest.raises(ProofError, match=r"^folding makes logits that are not finite"):
        prove([gated, plain, folded], normalize(), heldout)


def test_without_images_random_ones_must_do(made: Checkpoint) -> None:
    done = compact_checkpoint(made, None, checkpoint_path="ckpt.pt", folding=False)
    found = done.artifact.certificate
    assert found["evidence"] == "training record alone"
    assert found["heldout"] == 0
    assert {entry["inputs"] for entry in found["proof"]} == {"random uint8 images"}
    assert found["folding"] is None
    assert done.artifact.folded == ()
    assert [entry["peak"] for entry in found["live"]] == [None] * 6


def test_only_so_many_images_are_proven_on() -> None:
    images = torch.arange(1000).view(-1, 1, 1, 1).to(torch.uint8)
    part = ImageSet(images, torch.zeros(1000, dtype=torch.int64))
    found = proof_images(part, (1, 1, 1))
    assert len(found) == 256
    assert found[0].item() == 0
    assert found[-1].item() == images[-1].item(), "spread over all, which may be sorted by class"
    assert len(proof_images(images[:40], (1, 1, 1))) == 40


def test_twice_is_the_same(made: Checkpoint, heldout: Tensor, tmp_path: Path) -> None:
    for name in ("one.pt", "two.pt"):
        # The order of the records, and so of the deaths, does not matter.
        gates = made.gates if name == "one.pt" else made.gates[::-1]
        done = compact_checkpoint(replace(made, gates=gates), heldout, checkpoint_path="ckpt.pt")
        assert done.removed == DEAD
        done.artifact.certificate = {}
        done.artifact.save(tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


def test_a_compact_network_compacts_to_itself(compaction: Compaction) -> None:
    once = compaction.artifact.build()
    again = compact(once)
    assert again.code == once.code
    assert again.state_dict().keys() == once.state_dict().keys()
    refolded, pairs = fold(again)
    assert pairs == ()
    assert refolded.code == once.code


def test_a_network_that_lost_blocks_before_it_was_trained_on(heldout: Tensor) -> None:
    """Its checkpoint has no gates, and names what is gone in its network."""
    made = make_checkpoint(gated=False)
    network = replace(made.network, removed=DEAD)
    trained = replace(made, network=network, state=dict(network.build(made.state).state_dict()))
    done = compact_checkpoint(trained, heldout, checkpoint_path="ckpt.pt", folding=False)
    assert done.removed == DEAD
    x = torch.randn(2, 1, 8, 8)
    gated = done.artifact.gated(trained)
    assert torch.equal(done.artifact.build()(x), gated(x))
