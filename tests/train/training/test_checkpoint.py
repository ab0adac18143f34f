"""Checkpoints: what goes in comes out, and nothing else is accepted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eps_core import checksummed
from eps_core.errors import FileFormatError
from eps_train.gating import rewriting
from eps_train.training.checkpoint import FORMAT, VERSION, Checkpoint
from tests.checkpoints import make_checkpoint

DEAD = ("stages.2.1", "stages.0.2")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt.pt"
    make_checkpoint(dead=DEAD).save(path)
    return path


def test_round_trip(tmp_path: Path) -> None:
    made = replace(
        make_checkpoint(dead=DEAD),
        side_head={"bias": torch.ones(3)},
        resume={"epoch": 4, "optimizer": {"state": {0: {"momentum": torch.zeros(2)}}}},
    )
    digest = made.save(tmp_path / "a.pt")
    found = Checkpoint.load(tmp_path / "a.pt")
    assert found.digest == digest == made.digest
    for name in ("network", "gates", "data", "config", "metrics", "versions"):
        assert getattr(found, name) == getattr(made, name), name
    assert found.state.keys() == made.state.keys()
    assert all(torch.equal(tensor, made.state[name]) for name, tensor in found.state.items())
    assert found.side_head is not None
    assert found.side_head["bias"].tolist() == [1, 1, 1]
    assert found.resume is not None
    assert found.resume["optimizer"]["state"][0]["momentum"].tolist() == [0, 0]


def test_dead_blocks_are_listed_in_the_order_of_computation() -> None:
    assert make_checkpoint(dead=DEAD).dead == ("stages.0.2", "stages.2.1")
    assert make_checkpoint().dead == ()


def test_gated_network_has_every_branch_and_shuts_the_dead(file: Path) -> None:
    model = Checkpoint.load(file).build_gated().eval()
    gates = rewriting.gates(model)
    assert len(gates) == 9
    assert {name for name, gate in gates.items() if gate.dead} == set(DEAD)
    images = torch.randn(3, 1, 8, 8)
    expected = model(images)
    with torch.no_grad():
        for name in DEAD:
            model.get_submodule(f"{name}.conv2").weight.normal_()  # type: ignore[operator]
    assert torch.equal(model(images), expected)


def test_plain_networks_have_no_gates(tmp_path: Path) -> None:
    make_checkpoint(gated=False).save(tmp_path / "baseline.pt")
    found = Checkpoint.load(tmp_path / "baseline.pt")
    assert found.gates == []
    assert found.dead == ()
    assert not rewriting.gates(found.build_gated())


def test_a_missing_part_is_refused(file: Path) -> None:
    payload, _ = checksummed.read(file, format=FORMAT, version=VERSION)
    for part in payload.keys() - {"format", "version"}:
        less = {name: value for name, value in payload.items() if name != part}
        checksummed.write(file, less)
        with pytest.raises(FileFormatError, match=f"^{file}: not a usable checkpoint .*{part}"):
            Checkpoint.load(file)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("network", {"family": "cifar"}),
        ("network", None),
        ("gates", [{"block": "stages.0.0"}]),
        ("gates", None),
        ("data", {"name": "digits"}),
        ("data", []),
    ],
)
def test_unusable_parts_are_refused(file: Path, part: str, value: object) -> None:
    payload, _ = checksummed.read(file, format=FORMAT, version=VERSION)
    checksummed.write(file, {**payload, part: value})
    with pytest.raises(FileFormatError, match=f"^{file}: not a usable checkpoint"):
        Checkpoint.load(file)


def test_too_new(file: Path) -> None:
    payload, _ = checksummed.read(file, format=FORMAT, version=VERSION)
    checksummed.write(file, {**payload, "version": VERSION + 1})
    with pytest.raises(FileFormatError, match="newer than this eps-resnet reads"):
        Checkpoint.load(file)
