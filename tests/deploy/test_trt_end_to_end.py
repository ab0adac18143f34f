"""`eps-deploy --engine trt` from end to end: build, open, infer, verify.

On the GPU and the TensorRT of `engines/trt/machine`, which are made of host memory and ONNX
Runtime. What that cannot show is for `engines/trt/test_gpu.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from eps_deploy import load_bundle
from eps_deploy.bundle import open_engine, open_onnx
from eps_deploy.cli import verify
from eps_deploy.cli.deploy import main
from eps_deploy.export.mixed_precision import Repair, Trial
from eps_deploy.export.types import layer_types
from tests.commands import Result, files_in, run
from tests.deploy.engines.trt.fake_gpu import FakeGpu
from tests.deploy.engines.trt.machine import Machine, OnnxBuilder

ANYTHING_GOES = ("--min-speedup", "0", "--max-accuracy-drop", "100", "--time-budget", "0.2")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Two GPUs with all that builds and runs plans."""
    machine = Machine(gpu=FakeGpu(devices=2), builder=OnnxBuilder())
    machine.install(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return machine


def deploy(folder: Path, *args: object) -> Result:
    return run("eps-deploy", main, "--engine", "trt", *ANYTHING_GOES, *args, cwd=folder)


def report_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "bundle" / "report.json").read_bytes())
    return loaded


@pytest.mark.parametrize(
    ("flags", "executed", "device"),
    [
        (("--fp16",), "fp16", 0),
        (("--int8", "--calibration-samples", "100"), "fp16", 0),  # the fake has no int8 kernels
        (("--fp32", "--opt-batch", "1", "--max-batch", "1", "--device", "1"), "fp32", 1),
    ],
    ids=["fp16", "int8", "fp32 of one image on the second GPU"],
)
def test_a_bundle_with_its_plan(
    workshop: Path,
    machine: Machine,
    any_class: None,
    flags: tuple[str, ...],
    executed: str,
    device: int,
) -> None:
    result = deploy(workshop, *flags)
    assert result.code == 0, result.stderr
    assert machine.gpu.entered == {device}
    machine.gpu.check_clean()

    report = report_of(workshop)
    assert report["passed"] is True
    checks = {check["name"]: check["passed"] for check in report["checks"]}
    assert checks["parity-onnx-engine"]
    assert checks["parity-baseline-engine"]
    assert report["not_run"] == []
    assert set(report["precision"]["executed"]) == {executed}
    assert all(entry["device"] is not None for entry in report["latency"])
    assert len([*(workshop.parent / "cache").rglob("*.timing")]) == 1

    bundle = load_bundle(workshop / "bundle")
    assert bundle.model == "model.plan"
    assert {"model.plan.json", "model.plan.layers.json"} <= set(bundle.manifest["files"])
    with open_engine(bundle) as engine, open_onnx(bundle) as reference:
        assert engine.describe()["provider"] == "TensorRT"
        batch = np.random.default_rng(0).integers(
            0, 256, (engine.max_batch, *engine.input_shape), dtype=np.uint8
        )
        expected = reference.infer(batch)
        assert np.abs(engine.infer(batch) - expected).max() <= 1e-3 * np.abs(expected).max()
    machine.gpu.check_clean()

    proven = run("eps-verify", verify.main, "bundle", "--json", cwd=workshop)
    assert proven.code == 0, proven.stderr
    assert {c["name"]: c["passed"] for c in json.loads(proven.stdout)["checks"]}["plan"] is True
    machine.gpu.check_clean()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["", "dry"])
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--fp16", "--device", "2"), "GPU 2: CUDA sees 2 here"),
        (("--bf16",), "--bf16 needs compute capability 8.0"),
        (("--fp16", "--hardware-compatibility", "ampere-plus"), "needs compute capability 8.0"),
    ],
    ids=["device", "precision", "compatibility"],
)
def test_an_unsupported_gpu_is_refused_before_any_work(
    workshop: Path, machine: Machine, flags: tuple[str, ...], told: str, dry: tuple[str, ...]
) -> None:
    machine.gpu.capability = (7, 5)
    before = files_in(workshop)
    result = deploy(workshop, *flags, *dry)
    assert result.code == 1
    (line,) = result.stderr.splitlines()
    assert told in line
    assert "--defer-build" in line
    assert files_in(workshop) == before


def test_a_user_without_a_home_gets_a_plan_and_no_timing_cache(
    workshop: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in containers that run under any number."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert deploy(workshop, "--fp32").code == 0
    assert not machine.trt.count("IBuilderConfig", "create_timing_cache")
    assert load_bundle(workshop / "bundle").model == "model.plan"


def test_blocks_that_repair_keeps_stay_float32_in_the_plan(
    workshop: Path, machine: Machine, any_class: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The type check of the build allows them, and no others."""
    kept = "stages.0.0"

    def repair(candidates: Any, attempt: Any) -> Repair:
        assert kept in candidates
        trial = Trial(passed=True, value=0.0)
        return Repair(kept=(kept,), before=trial, after=trial, trials=1)

    monkeypatch.setattr("eps_deploy.pipeline.pipeline.repair", repair)
    result = deploy(workshop, "--fp16", "--repair")
    assert result.code == 0, result.stderr
    types = layer_types(onnx.load(workshop / "bundle" / "model.onnx"))
    in_float32 = {name for name, kind in types.items() if kind == "float32"}
    assert in_float32 == {f"{kept}.conv1", f"{kept}.conv2"}
    assert report_of(workshop)["precision"]["executed"].keys() == {"fp16", "fp32"}
