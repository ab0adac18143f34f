"""`benchmarks/deploy.py --device`, on the CPU; TensorRT on a GPU made of host memory."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eps_deploy.export.export import export_onnx
from eps_deploy.precision import PRECISIONS
from tests.deploy.engines.trt.machine import Machine, OnnxBuilder
from tests.meta.project import ROOT


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_each_engine_and_batch_has_its_row(benchmarks: Any) -> None:
    deploy = benchmarks("deploy")
    args = "--device cpu --depth 8 --batches 1,3 --seconds 0.05 --engines trt,ort,eager"
    done = CliRunner().invoke(deploy.main, args.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    rows = told["engines"]
    assert rows[0] == {"engine": "trt", "not_run": "TensorRT needs an NVIDIA GPU"}
    assert [(row["engine"], row["batch"]) for row in rows[1:]] == [
        (engine, batch) for engine in ("ort", "eager") for batch in (1, 3)
    ]
    for row in rows[1:]:
        assert row["milliseconds"].keys() == row["images_per_second"].keys() == {"full", "compact"}
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
        assert json.dumps(row) in done.stderr  # as soon as it was measured
    assert told["network"] == {"model": "cifar:8x16", "image": [3, 32, 32], "dead": 2}
    assert {"what": "pruned", "why": "not among --sections"} in told["not_run"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("--batches 0", "give numbers from 1 on"),
        ("--batches x", "give numbers from 1 on"),
        ("--engines onnx", "the engines are trt, ort, eager, compile"),
        ("--sections all", "the sections are pruned, runtimes, export, engines"),
        ("--depth 8", "--depth only applies to --sections engines"),
    ],
)
def test_wrong_options_are_refused(benchmarks: Any, args: str, told: str) -> None:
    done = CliRunner().invoke(benchmarks("deploy").main, args.split())
    assert done.exit_code == 2
    assert told in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda(benchmarks: Any) -> None:
    done = CliRunner().invoke(benchmarks("deploy").main, ["--device", "cuda"])
    assert done.exit_code == 1
    assert "cuda" in done.stderr


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_answers_as_torch_does(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str
) -> None:
    engines = benchmarks("_engines")
    machine = Machine(builder=OnnxBuilder())
    machine.install(monkeypatch)
    network = benchmarks("_pruned").pair(8, 2).compact
    path = tmp_path / "model.onnx"
    export_onnx(network.network, network.identity, path, precision=PRECISIONS[precision])
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    chosen = {"precision": PRECISIONS[precision], "max_batch": 4}
    with engines.opened("trt", network, path, device=torch.device("cuda"), **chosen) as infer:
        found = infer(images)
    with engines.opened("eager", network, path, device=torch.device("cpu"), **chosen) as infer:
        wanted = infer(images)
    assert np.abs(found - wanted).max() <= 1e-2 * np.abs(wanted).max()
    machine.gpu.check_clean()
