"""`compact.pt`: whole and the right one, or refused."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eps_compact
from eps_compact.artifact import FORMAT, VERSION, CompactArtifact
from eps_core import checksummed
from eps_core.errors import FileFormatError
from eps_train.data import dataset
from eps_train.gating import rewriting
from eps_train.gating.folding import fold
from tests.checkpoints import make_checkpoint

DEAD = ("stages.1.0", "stages.2.2")


def make_artifact(*, folded: bool = False) -> CompactArtifact:
    checkpoint = make_checkpoint(dead=DEAD)
    model = eps_compact.compact(checkpoint.build_gated())
    model, pairs = fold(model) if folded else (model, ())
    return CompactArtifact(
        network=replace(checkpoint.network, gated=(), removed=DEAD),
        state=model.state_dict(),
        folded=pairs,
        data=checkpoint.data,
        certificate={"removed": [{"block": name} for name in DEAD]},
        checkpoint={"path": "../run/ckpt.pt", "digest": "0" * 64},
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "compact.pt"
    make_artifact().save(path)
    return path


def rewrite(file: Path, **parts: Any) -> None:
    payload, _ = checksummed.read(file, format=FORMAT, version=VERSION)
    checksummed.write(file, {**payload, **parts})


def images() -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_round_trip(tmp_path: Path) -> None:
    made = make_artifact()
    digest = made.save(tmp_path / "compact.pt")
    found = CompactArtifact.load(tmp_path / "compact.pt")
    assert found.digest == digest == made.digest
    for name in ("network", "data", "certificate", "checkpoint", "versions"):
        assert getattr(found, name) == getattr(made, name), name
    assert found.data == dataset.load("digits").identity
    assert found.state.keys() == made.state.keys()


def test_the_network_answers_as_the_gated_one(file: Path) -> None:
    gated = make_checkpoint(dead=DEAD).build_gated().eval()
    for model in (eps_compact.load(file), CompactArtifact.load(file).build()):
        assert not model.training
        assert not rewriting.gates(model)
        assert not rewriting.taps(model)
        assert torch.equal(model(images()), gated(images()))


def test_it_holds_exactly_the_tensors_of_the_network(file: Path) -> None:
    artifact = CompactArtifact.load(file)
    assert artifact.state.keys() == artifact.build().state_dict().keys()
    assert not any(name.startswith(DEAD) for name in artifact.state)


def test_built_networks_are_independent(file: Path) -> None:
    artifact = CompactArtifact.load(file)
    one, other = artifact.build(), artifact.build()
    expected = other(images())
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert torch.equal(other(images()), expected)
    assert torch.equal(artifact.build()(images()), expected)


def test_missing_surplus_and_misshapen_tensors(file: Path) -> None:
    state = CompactArtifact.load(file).state
    less = {name: tensor for name, tensor in state.items() if name != "classifier.bias"}
    wrong = {
        r"missing, the first is classifier\.bias": less,
        r"does not have, first stages\.2\.2\.bn1\.bias": {
            **state,
            "stages.2.2.bn1.bias": torch.zeros(16),
        },
        r"tensor classifier\.bias has another shape or type": {
            **less,
            "classifier.bias": torch.zeros(11),
        },
    }
    for message, tensors in wrong.items():
        rewrite(file, state=tensors)
        with pytest.raises(
            FileFormatError, match=f"^{file}: .*{message}.*; run eps-compact again$"
        ):
            CompactArtifact.load(file)


def test_a_network_with_gates_is_none(file: Path) -> None:
    network = make_checkpoint().network
    rewrite(file, network=network.to_dict(), state=network.build().state_dict())
    with pytest.raises(FileFormatError, match="a compact network has no gates"):
        CompactArtifact.load(file)


@pytest.mark.parametrize(
    "network",
    [
        {"family": "vgg", "arguments": {}, "gated": [], "removed": []},
        {"family": "cifar", "arguments": {"depth": 21}, "gated": [], "removed": []},
        {"family": "cifar", "arguments": {"depth": 20}, "gated": [], "removed": ["stages.9.9"]},
    ],
)
def test_unknown_networks(file: Path, network: dict[str, Any]) -> None:
    rewrite(file, network=network)
    with pytest.raises(FileFormatError, match=f"^{file}: "):
        CompactArtifact.load(file)


@pytest.mark.parametrize("part", ["network", "state", "data", "certificate", "checkpoint"])
@pytest.mark.parametrize("value", [None, 3, {"no": "such"}, []])
def test_unusable_parts(file: Path, part: str, value: object) -> None:
    if part in ("certificate", "checkpoint") and isinstance(value, dict):
        value = "text"
    rewrite(file, **{part: value})
    with pytest.raises(FileFormatError, match=f"^{file}: "):
        CompactArtifact.load(file)


def test_missing_parts(file: Path) -> None:
    payload, _ = checksummed.read(file, format=FORMAT, version=VERSION)
    for part in payload.keys() - {"format", "version"}:
        checksummed.write(file, {name: value for name, value in payload.items() if name != part})
        with pytest.raises(FileFormatError, match=f"not a usable compact network .*{part}"):
            CompactArtifact.load(file)


def test_damage(file: Path) -> None:
    whole, chance = file.read_bytes(), random.Random(0)
    for bit in chance.sample(range(8 * len(whole)), 200):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        with pytest.raises(FileFormatError, match=f"^{file}: damaged"):
            CompactArtifact.load(file)
    for length in chance.sample(range(len(whole)), 50):
        file.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=f"^{file}: damaged"):
            CompactArtifact.load(file)


def test_a_checkpoint_is_no_artifact(tmp_path: Path) -> None:
    make_checkpoint().save(tmp_path / "ckpt.pt")
    with pytest.raises(
        FileFormatError, match="expected an eps-resnet-compact file, found eps-resnet-checkpoint"
    ):
        eps_compact.load(tmp_path / "ckpt.pt")


def test_too_new(file: Path) -> None:
    rewrite(file, version=VERSION + 1)
    with pytest.raises(FileFormatError, match="newer than this eps-resnet reads"):
        eps_compact.load(file)


# -- folded ----------------------------------------------------------------------------------------


@pytest.fixture
def folded(tmp_path: Path) -> Path:
    path = tmp_path / "folded.pt"
    make_artifact(folded=True).save(path)
    return path


def test_a_folded_network_is_built_as_it_was_saved(folded: Path) -> None:
    made, found = make_artifact(folded=True), CompactArtifact.load(folded)
    assert found.folded == made.folded
    assert len(found.folded) == 1 + 7, "the stem, and one in each block that stays"
    model, _ = fold(make_artifact().build())
    built = found.build()
    assert not built.training
    assert torch.equal(built(images()), model(images()))
    assert built.state_dict().keys() == found.state.keys()
    assert not any(name.startswith("stem.1.") for name in found.state)


def test_files_from_before_folding(file: Path) -> None:
    payload, _ = checksummed.read(file, format=FORMAT, version=VERSION)
    del payload["folded"]
    checksummed.write(file, {**payload, "version": 1})
    found = CompactArtifact.load(file)
    assert found.folded == ()
    gated = make_checkpoint(dead=DEAD).build_gated().eval()
    assert torch.equal(found.build()(images()), gated(images()))


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (["stages.0.0.conv2", "stages.0.1.bn1"], "cannot be folded into stages.0.0.conv2"),
        (["stem.0", "stem.1"], "cannot be folded into stem.0"),
        (["nowhere", "stem.1"], "missing, the first is nowhere.weight"),
        (["stem.0"], "not a usable compact network"),
        (["stem.0", 3], "not a usable compact network"),
        (None, "not a usable compact network"),
    ],
)
def test_pairs_that_are_none(folded: Path, added: object, message: str) -> None:
    pairs = [list(pair) for pair in CompactArtifact.load(folded).folded]
    rewrite(folded, folded=[*pairs, added])
    with pytest.raises(FileFormatError, match=f"^{folded}: .*{message}"):
        CompactArtifact.load(folded)


def test_forgotten_pairs(folded: Path) -> None:
    rewrite(folded, folded=[])
    with pytest.raises(FileFormatError, match=f"^{folded}: tensors are missing"):
        CompactArtifact.load(folded)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (None, "missing, the first is stem.0.bias"),
        (torch.zeros(5), "tensor stem.0.bias has another shape or type"),
        (torch.zeros(4, dtype=torch.float64), "tensor stem.0.bias has another shape or type"),
    ],
)
def test_biases_that_do_not_fit(folded: Path, bias: Tensor | None, message: str) -> None:
    state = CompactArtifact.load(folded).state
    del state["stem.0.bias"]
    rewrite(folded, state=state if bias is None else {**state, "stem.0.bias": bias})
    with pytest.raises(FileFormatError, match=message):
        CompactArtifact.load(folded)


def test_the_gated_network_that_it_stands_for() -> None:
    artifact = make_artifact()
    checkpoint = make_checkpoint(dead=DEAD[:1])  # the other block was removed alive
    gated = artifact.gated(checkpoint)
    assert not gated.training
    assert torch.equal(gated(images()), artifact.build()(images()))
    with pytest.raises(FileFormatError, match=r"removed stages\.2\.2, which the checkpoint"):
        artifact.gated(make_checkpoint(depth=8))
