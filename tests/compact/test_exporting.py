"""Exported networks, read by processes that have none of our packages."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eps_compact.artifact import CompactArtifact
from eps_compact.compaction import compact
from eps_compact.exporting import ABOUT, KINDS, FromPixels, export, files
from eps_core.errors import ConfigError
from eps_train.gating import rewriting
from eps_train.models.spec import NetworkSpec
from tests.checkpoints import make_checkpoint
from tests.commands import files_in

READER = Path(__file__).with_name("numpy_reader.py")
# Python's own way to say "not installed", before anything else is imported.
BLOCKED = """
import importlib.abc, runpy, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
"""
OURS = ("eps_train", "eps_compact", "eps_deploy")


@cache
def artifact(family: str = "cifar") -> CompactArtifact:
    """Of a network with dead blocks, the first of a stage among them."""
    checkpoint = make_checkpoint(depth=14)
    spec = checkpoint.network
    dead: tuple[str, ...] = ("stages.0.1", "stages.2.0")
    state = checkpoint.state
    if family != "cifar":
        spec = NetworkSpec.parse("imagenet:50x4", in_channels=1, classes=10)
        torch.manual_seed(0)
        state, dead = dict(spec.build().state_dict()), (spec.gated[0], spec.gated[7])
    plain = compact(spec.build(state), dead=dead)
    return CompactArtifact(
        network=NetworkSpec(family=spec.family, arguments=spec.arguments, removed=dead),
        state=dict(plain.state_dict()),
        data=checkpoint.data,
        certificate={},
        checkpoint={"path": "ckpt.pt", "digest": "c" * 64},
        digest="a" * 64,
    )


def pixels(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)


def elsewhere(code: str, *arguments: object, blocked: tuple[str, ...], cwd: Path) -> str:
    """Run Python code in a process that cannot import the modules `blocked`."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(blocked=blocked) + code, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TORCH_READER = """
import json, torch
extra = {{{about!r}: ""}}
program = torch.export.load("compact.pt2", extra_files=extra)
model = program.module()
inputs = torch.load("inputs.pt", weights_only=True)
torch.save([model(images) for images in inputs], "outputs.pt")
assert not any(name.startswith("eps_") for name in sys.modules)
print(json.loads(extra[{about!r}])["classes"])
"""


def test_a_process_with_torch_alone_runs_pt2(tmp_path: Path) -> None:
    source = artifact()
    assert export(source, tmp_path / "compact.pt2", "pt2") == (tmp_path / "compact.pt2",)
    batches = [pixels(count) for count in (1, 2, 7, 32)]
    torch.save(batches, tmp_path / "inputs.pt")
    code = TORCH_READER.format(about=ABOUT)
    said = elsewhere(code, blocked=OURS, cwd=tmp_path)
    assert said.strip() == str([str(digit) for digit in range(10)])
    model = FromPixels(source.build(), source.data)
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    for images, found in zip(batches, outputs, strict=True):
        assert found.shape == (len(images), 10)
        assert torch.equal(found, model(images))


@pytest.mark.parametrize("family", ["cifar", "imagenet"])
def test_a_process_with_numpy_and_safetensors_alone_computes_the_logits(
    family: str, tmp_path: Path
) -> None:
    source = artifact(family)
    written = export(source, tmp_path / "compact.safetensors", "safetensors")
    assert [path.name for path in written] == ["compact.safetensors", "compact.safetensors.json"]
    np.save(tmp_path / "images.npy", pixels(5).numpy())
    run = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = (READER, "compact.safetensors", "images.npy", "logits.npy")
    elsewhere(run, *arguments, blocked=("torch", *OURS), cwd=tmp_path)
    found = np.load(tmp_path / "logits.npy")
    with torch.no_grad():
        expected = FromPixels(source.build(), source.data)(pixels(5)).numpy()
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def described(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.with_name(f"{path.name}.json").read_text("utf-8"))
    return content


def test_the_description_names_everything(tmp_path: Path) -> None:
    source = artifact()
    path = tmp_path / "compact.safetensors"
    export(source, path, "safetensors")
    found = described(path)
    assert found["input"] == {"name": "images", "dtype": "uint8", "shape": ["N", 1, 8, 8]}
    assert found["output"] == {"name": "logits", "dtype": "float32", "shape": ["N", 10]}
    assert found["classes"] == [str(digit) for digit in range(10)]
    assert found["preprocessing"] == source.data.preprocessing.to_dict()
    assert (found["compact"], found["checkpoint"]) == ("a" * 64, "c" * 64)
    assert found["tensors"]["file"] == path.name
    assert found["tensors"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["tensors"]["names"]["network.stem.0.weight"]["shape"] == [4, 1, 3, 3]
    convolutions = [step for step in found["steps"] if step["op"] == "aten.conv2d"]
    assert len(convolutions) == 1 + 2 * 4, "the stem, and two in each of the four live blocks"
    assert convolutions[0]["inputs"]["padding"] == [1, 1]
    assert convolutions[0]["shape"] == ["N", 4, 8, 8]
    assert not any("stages.0.1" in name for name in found["tensors"]["names"])
    assert not any("num_batches_tracked" in name for name in found["tensors"]["names"])


def test_the_same_artifact_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        for kind in KINDS:
            export(artifact(), tmp_path / folder / f"compact.{kind}", kind)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    export(artifact(), tmp_path / "compact.pt2", "pt2")
    here = str(Path(__file__).parents[2]).encode()
    with zipfile.ZipFile(tmp_path / "compact.pt2") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert here not in content, name
            assert b"site-packages" not in content, name


@pytest.mark.parametrize("kind", KINDS)
def test_existing_files_stay_unless_forced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"compact.{kind}"
    last = files(path, kind)[-1]
    last.write_text("mine")
    with pytest.raises(ConfigError, match=f"{last.name}: exists; give --force"):
        export(artifact(), path, kind)
    assert files_in(tmp_path) == {last.name: b"mine"}
    export(artifact(), path, kind, force=True)
    assert set(files_in(tmp_path)) == {file.name for file in files(path, kind)}


def test_wrong_names() -> None:
    with pytest.raises(ConfigError, match=r"--export onnx: no such format; choose pt2 or safet"):
        files(Path("compact.onnx"), "onnx")
    with pytest.raises(ConfigError, match=r"compact\.pt: not a pt2 file's name; end it in \.pt2"):
        files(Path("compact.pt"), "pt2")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match="pip install safetensors"):
        export(artifact(), tmp_path / "compact.safetensors", "safetensors")
    assert not files_in(tmp_path)


class _Odd(nn.Module):
    """Steps in place, learned tensors, sizes, several results, an infinite constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(1, 6, 3), nn.Parameter(torch.ones(6, 1, 1))
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.conv(x) * self.scale).chunk(2, dim=1)
        both = torch.cat([first.relu_(), second.clamp(-float("inf"), 6.0)], dim=1)
        logits: Tensor = self.head(both.view(both.size(0), 6, -1).mean(-1))
        return logits


def test_networks_of_other_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = artifact(), rewriting.trace(_Odd().eval())
    monkeypatch.setattr(CompactArtifact, "build", lambda self: model)
    path = tmp_path / "compact.safetensors"
    export(source, path, "safetensors")
    found = described(path)
    assert not any(step["op"].endswith("_") for step in found["steps"])
    assert "network.scale" in found["tensors"]["names"]
    assert {"float": "-inf"} in [v for s in found["steps"] for v in s["inputs"].values()]
    known = {"images"}
    for step in found["steps"]:
        for value in step["inputs"].values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict) and "step" in item:
                    assert item["step"] in known, step
        known.add(step["name"])
    assert found["result"]["step"] in known
