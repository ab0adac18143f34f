"""One small network, compacted and deployed once for all tests here: exporting takes seconds."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from eps_compact import CompactArtifact, compact
from eps_deploy.bench.accuracy import AGREEMENT_LIMITS
from eps_deploy.bundle import MANIFEST, NO_DIGEST, encode_manifest
from eps_deploy.cli.deploy import main
from eps_train.models.spec import NetworkSpec
from tests.checkpoints import make_checkpoint
from tests.commands import Result, run
from tests.deploy.fake_ort import GPU, FakeOrtValue, FakeSession

DEPTH = 14
DEAD = ("stages.0.1", "stages.1.0", "stages.2.1")


def make_workshop(folder: Path, *, seed: int = 0) -> Path:
    """`ckpt.pt`, `compact.pt` and `baseline.pt` of a depth-14 network with three dead blocks."""
    checkpoint = make_checkpoint(depth=DEPTH, dead=DEAD, seed=seed)
    digest = checkpoint.save(folder / "ckpt.pt")
    network = checkpoint.network
    CompactArtifact(
        network=NetworkSpec(
            family=network.family, arguments=network.arguments, removed=checkpoint.dead
        ),
        state=dict(compact(checkpoint.build_gated()).state_dict()),
        data=checkpoint.data,
        certificate={},
        checkpoint={"path": "ckpt.pt", "digest": digest},
    ).save(folder / "compact.pt")
    make_checkpoint(depth=DEPTH, gated=False, seed=seed).save(folder / "baseline.pt")
    return folder


def deploy(folder: Path, *args: object) -> Result:
    """`eps-deploy --engine ort` in `folder`, with little time for latency."""
    return run("eps-deploy", main, "--engine", "ort", "--time-budget", "0.4", *args, cwd=folder)


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The workshop with its bundle, read only, and what the command said."""
    folder = make_workshop(tmp_path_factory.mktemp("deployed"))
    # Half as fast is fast enough: what the clock says is no matter of a test.
    return folder, deploy(folder, "--min-speedup", "0", "--max-accuracy-drop", "100", "--json")


@pytest.fixture(scope="session")
def deployed(first_run: tuple[Path, Result]) -> Path:
    folder, result = first_run
    assert result.code == 0, result.stderr
    return folder


@pytest.fixture
def bundle(deployed: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(deployed / "bundle", tmp_path / "bundle"))


@pytest.fixture(scope="session")
def overflowing(deployed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that passes every check, and whose network is NaN on white and inf on black images.

    As float16 can be on images that are unlike those that it was judged on.
    """
    folder = tmp_path_factory.mktemp("overflowing") / "bundle"
    shutil.copytree(deployed / "bundle", folder)
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = "sound" if name == "logits" else name

    def constant(name: str, value: float) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))

    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axes"))
    constant("nan", np.nan)
    constant("inf", np.inf)
    constant("nearly white", 254.5)
    constant("nearly black", 0.5)
    model.graph.node.extend(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("Cast", ["flat"], ["grey"], to=onnx.TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["grey", "axes"], ["mean"]),
            helper.make_node("Greater", ["mean", "nearly white"], ["white"]),
            helper.make_node("Less", ["mean", "nearly black"], ["black"]),
            helper.make_node("Where", ["black", "inf", "sound"], ["brighter"]),
            helper.make_node("Where", ["white", "nan", "brighter"], ["logits"]),
        ]
    )
    reseal(folder, files={"model.onnx": model.SerializeToString()})
    return folder


def reseal(
    bundle: Path,
    change: Callable[[dict[str, Any]], object] = lambda fields: None,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Forge a bundle: other files, another manifest, and digests that match them, as anyone can."""
    fields = json.loads((bundle / MANIFEST).read_bytes())
    for name, content in files.items():
        (bundle / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        fields["files"][name] = {"sha256": digest, "bytes": len(content)}
    change(fields)
    (bundle / MANIFEST).write_bytes(encode_manifest({**fields, "digest": NO_DIGEST}))


@pytest.fixture
def workshop(deployed: Path, tmp_path: Path) -> Path:
    """A copy of the workshop without its bundle."""
    folder = tmp_path / "workshop"
    shutil.copytree(deployed, folder, ignore=shutil.ignore_patterns("bundle"))
    return folder


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    """An ONNX Runtime with all of its providers."""
    seen: dict[str, list[Any]] = {"threads": [], "captured": [], "severities": []}
    session = type("Session", (FakeSession,), seen)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(GPU))
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "OrtValue", FakeOrtValue)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("what is missing"))
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", seen["severities"].append)
    return session


@pytest.fixture
def any_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained network's classes are near ties, which rounding decides."""
    for name in AGREEMENT_LIMITS:
        monkeypatch.setitem(AGREEMENT_LIMITS, name, 0.0)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Any:
    """Threads that wait for one another on shared cores make small networks far slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
