"""Exported networks, read by processes that have none of our packages."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eps_compact.artifact import CompactArtifact
from eps_compact.compaction import compact
from eps_compact.exporting import ABOUT, KINDS, export
from eps_core.errors import ConfigError
from eps_train.gating import rewriting
from eps_train.models.resnets import FromPixels
from eps_train.models.spec import NetworkSpec
from tests.checkpoints import make_checkpoint
from tests.commands import files_in

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
    export(source, tmp_path / "compact.pt2", "pt2")
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


SAFETENSORS_READER = """
import json, numpy
from safetensors import safe_open
with safe_open("compact.safetensors", "numpy") as file:
    numpy.savez("tensors.npz", **{{name: file.get_tensor(name) for name in file.keys()}})
    print(file.metadata()[{about!r}])
"""


@pytest.mark.parametrize("family", ["cifar", "imagenet"])
def test_a_process_with_safetensors_alone_reads_tensors_and_description(
    family: str, tmp_path: Path
) -> None:
    source = artifact(family)
    export(source, tmp_path / "compact.safetensors", "safetensors")
    code = SAFETENSORS_READER.format(about=ABOUT)
    found = json.loads(elsewhere(code, blocked=("torch", *OURS), cwd=tmp_path))
    assert found["input"] == {"name": "images", "dtype": "uint8", "shape": ["N", 1, 8, 8]}
    assert found["output"] == {"name": "logits", "dtype": "float32", "shape": ["N", 10]}
    assert found["classes"] == [str(digit) for digit in range(10)]
    assert found["preprocessing"] == source.data.preprocessing.to_dict()
    assert (found["compact"], found["checkpoint"]) == ("a" * 64, "c" * 64)
    expected = FromPixels(source.build(), source.data).state_dict()
    tensors = np.load(tmp_path / "tensors.npz")
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert np.array_equal(tensors[name], tensor.numpy()), name


class _Tied(nn.Module):
    """Shares a weight, and computes with a buffer that is not in its state dict."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.two.weight = self.one.weight
        self.register_buffer("table", torch.arange(64.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x.flatten(1)) + self.table)
        return out


def test_tensors_that_are_shared_or_not_saved_are_exported_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rewriting.trace(_Tied().eval())
    monkeypatch.setattr(CompactArtifact, "build", lambda self: model)
    path = tmp_path / "compact.safetensors"
    export(artifact(), path, "safetensors")
    found = load_file(path)
    assert torch.equal(found["network.one.weight"], found["network.two.weight"])
    assert torch.equal(found["network.table"], torch.arange(64.0))


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
    path.write_text("mine")
    with pytest.raises(ConfigError, match=f"{path.name}: exists; give --force"):
        export(artifact(), path, kind)
    assert files_in(tmp_path) == {path.name: b"mine"}
    export(artifact(), path, kind, force=True)
    assert list(files_in(tmp_path)) == [path.name]
    assert path.stat().st_size > 1000


def test_wrong_names() -> None:
    with pytest.raises(ConfigError, match=r"--export onnx: no such format; choose pt2 or safet"):
        export(artifact(), Path("compact.onnx"), "onnx")
    with pytest.raises(ConfigError, match=r"compact\.pt: not a pt2 file's name; end it in \.pt2"):
        export(artifact(), Path("compact.pt"), "pt2")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match="pip install safetensors"):
        export(artifact(), tmp_path / "compact.safetensors", "safetensors")
    assert not files_in(tmp_path)
