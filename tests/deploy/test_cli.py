"""`eps-deploy` from end to end: what it writes, what it says, how it ends."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from eps_deploy import load_bundle
from eps_deploy.cli.deploy import main
from eps_train.data.dataset import DataIdentity
from tests.commands import Result, files_in, run
from tests.deploy.conftest import DEAD, deploy, make_workshop


def report_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "bundle" / "report.json").read_bytes())
    return loaded


def test_a_run_with_a_baseline(first_run: tuple[Path, Result]) -> None:
    folder, result = first_run
    assert result.code == 0, result.stderr
    assert "Verdict: passed: all 6 checks" in result.stderr
    assert "bundle/report.html" in result.stderr
    assert sorted(files_in(folder)) == sorted(
        [
            "baseline.pt",
            "ckpt.pt",
            "compact.pt",
            *(f"bundle/{name}" for name in (*load_bundle(folder / "bundle").manifest["files"],)),
            "bundle/manifest.json",
        ]
    )


def test_json_is_the_report_alone_on_stdout(first_run: tuple[Path, Result]) -> None:
    folder, result = first_run
    assert json.loads(result.stdout) == {**report_of(folder), "bundle": "bundle"}


def test_the_keys_that_other_programs_read(deployed: Path) -> None:
    report = report_of(deployed)
    assert report["schema"] == 2
    assert report["passed"] is True
    assert [check["name"] for check in report["checks"]] == [
        "parity-gated-compact",
        "parity-compact-onnx",
        "parity-baseline-onnx",
        "agreement",
        "accuracy",
        "speedup",
    ]
    for check in report["checks"]:
        assert check.keys() >= {"name", "passed", "value", "limit"}
    for key in ("parameters", "flops", "blocks"):
        assert report[key]["baseline"] > report[key]["compact"] > 0
    blocks = report["blocks"]
    assert (blocks["baseline"], blocks["compact"], blocks["removed"]) == (6, 3, list(DEAD))
    assert [block["state"] for block in blocks["map"]].count("dead") == 3
    accuracy = report["accuracy"]
    assert accuracy["samples"] == 359
    assert accuracy["compact"] == accuracy["engine"]
    assert 0 <= accuracy["baseline"] <= 1
    drop = accuracy["drop"]
    assert drop["points"] == pytest.approx(100 * (accuracy["baseline"] - accuracy["engine"]))
    assert drop["low"] <= drop["points"] <= drop["high"]
    for stage in report["parity"]:
        assert stage.keys() >= {"stage", "max_abs", "top1_agreement", "worst_sample"}
        assert 0 <= stage["worst_sample"] < 359
        assert stage["batches"] == [1, 2, 16, 32]
    assert report["parity"][0]["max_abs"] == 0
    assert [entry["batch"] for entry in report["latency"]] == [1, 16]
    for entry in report["latency"]:
        for side in ("baseline_ms", "compact_ms"):
            times = [entry[side][name] for name in ("p50", "p90", "p95", "p99")]
            assert times == sorted(times)
            assert times[0] > 0
        assert entry["speedup"]["low"] <= entry["speedup"]["median"] <= entry["speedup"]["high"]
        assert entry["blocks"] >= 5
    assert report["environment"]["engine"]["provider"] == "CPUExecutionProvider"
    assert report["not_run"] == []


def test_without_a_baseline_the_accuracy_is_not_run_and_a_failed_check_exits_with_3(
    tmp_path: Path,
) -> None:
    """One run for both, since the full-depth network has to be exported. The files are written."""
    folder = make_workshop(tmp_path)
    (folder / "baseline.pt").unlink()
    result = deploy(folder, "--min-speedup", "1000")
    assert result.code == 3
    assert "Verdict: FAILED: speedup" in result.stderr
    report = report_of(folder)
    assert report["passed"] is False
    assert [check["name"] for check in report["checks"] if not check["passed"]] == ["speedup"]
    assert "accuracy" not in [check["name"] for check in report["checks"]]
    assert report["accuracy"]["baseline"] is None
    assert report["accuracy"]["drop"] is None
    assert "--with-baseline" in report["not_run"][0]["why"]
    assert report["parameters"]["baseline"] > report["parameters"]["compact"]
    assert load_bundle(folder / "bundle").manifest["source"]["baseline_digest"] is None
    # All branches computed, also those that eps-compact removed.
    sizes = {
        name: (folder / "bundle" / name).stat().st_size for name in ("model.onnx", "baseline.onnx")
    }
    assert sizes["baseline.onnx"] > 1.2 * sizes["model.onnx"]


def test_an_existing_output_needs_force(workshop: Path, deployed: Path) -> None:
    shutil.copytree(deployed / "bundle", workshop / "bundle")
    before = files_in(workshop)
    refused = deploy(workshop)
    assert refused.code == 1
    assert refused.error == (
        "eps-deploy: error: bundle: exists already; choose another place or add --force"
    )
    assert files_in(workshop) == before
    for option in ((), ("--checkpoint",), ("--baseline",)):
        for dry in ((), ("--dry-run",)):
            mistyped = deploy(workshop, *option, "none.pt", *dry)
            assert (mistyped.code, mistyped.error) == (
                1,
                "eps-deploy: error: none.pt: no such file",
            )
    forced = deploy(workshop, "--force", "--min-speedup", "0", "--max-accuracy-drop", "100")
    assert forced.code == 0, forced.stderr
    assert files_in(workshop) != before
    load_bundle(workshop / "bundle")


def test_another_output_and_everything_named(workshop: Path, tmp_path: Path) -> None:
    for name in ("ckpt.pt", "baseline.pt", "compact.pt"):
        (workshop / name).rename(workshop / f"my-{name}")
    result = deploy(
        tmp_path,
        workshop / "my-compact.pt",
        "--checkpoint",
        workshop / "my-ckpt.pt",
        "--baseline",
        workshop / "my-baseline.pt",
        "-o",
        "out/[odd] name",
        "--min-speedup",
        "0",
        "--max-accuracy-drop",
        "100",
    )
    assert result.code == 0, result.stderr
    assert "out/[odd] name/report.html" in result.stderr
    assert load_bundle(tmp_path / "out" / "[odd] name").manifest["source"]["baseline_digest"]


def test_a_model_that_computes_something_else_fails_the_parity_check(
    workshop: Path, deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module, identity: DataIdentity, path: Path, **options: Any) -> None:
        shutil.copy(deployed / "bundle" / "baseline.onnx", path)

    monkeypatch.setattr("eps_deploy.pipeline.builder.export_onnx", wrong)
    result = deploy(workshop, "--min-speedup", "0", "--max-accuracy-drop", "100")
    assert result.code == 3
    assert "Verdict: FAILED: parity-compact-onnx, agreement (2 of 6 checks)" in result.stderr
    stage = report_of(workshop)["parity"][1]
    assert stage["passed"] is False
    assert math.isfinite(stage["max_abs"])
    assert stage["relative"] > stage["limit"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--engine", "ort", "--bf16"], "--bf16: ONNX Runtime has no bfloat16 convolutions"),
        (["--engine", "ort", "--tf32"], "--tf32: only NVIDIA GPUs have it"),
        (["--engine", "ort", "--repair"], "--repair: nothing to repair in fp32"),
        (["--engine", "ort", "--opt-batch", "9", "--max-batch", "8"], "--opt-batch 9 --max-batch"),
        (
            ["--engine", "ort", "--int8", "--calibration-samples", "3"],
            "--calibration-samples 3: ",
        ),
        (["nowhere.pt", "--engine", "ort"], "nowhere.pt: no such file"),
        (["ckpt.pt", "--engine", "ort"], "expected an eps-resnet-compact file"),
        (["--engine", "ort", "--checkpoint", "nowhere.pt"], "nowhere.pt: no such file"),
        (["--engine", "ort", "--baseline", "ckpt.pt"], "no plain baseline"),
        (["--engine", "ort", "--min-speedup", "nan"], "--min-speedup nan: give a number"),
        (["--engine", "ort", "--min-speedup", "inf"], "--min-speedup inf: give a number"),
        (["--engine", "ort", "--max-accuracy-drop", "-1"], "--max-accuracy-drop -1.0: give"),
        (["--engine", "ort", "--time-budget", "-1"], "--time-budget -1.0: give"),
        (["--engine", "ort", "-o", "ckpt.pt"], "ckpt.pt: exists already"),
        (["--engine", "ort", "-o", "ckpt.pt", "--force"], "ckpt.pt: is not a bundle"),
        (["--engine", "ort", "-o", ".", "--force"], ".: is not a bundle"),
        (["--engine", "ort", "-o", "ckpt.pt/bundle"], "ckpt.pt/bundle: ckpt.pt is a file"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    workshop: Path, arguments: list[str], told: str
) -> None:
    before = files_in(workshop)
    result = run("eps-deploy", main, *arguments, cwd=workshop)
    assert (result.code, result.stdout) == (1, "")
    assert result.error.startswith("eps-deploy: error: ")
    assert told in result.error
    assert files_in(workshop) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--engine", "cuda"],
        ["--engine", "ort", "--min-speedup", "fast"],
        ["--engine", "ort", "--fp32", "--fp16"],
        ["--engine", "ort", "--fp16", "--bf16"],
        ["--engine", "ort", "--fp32", "--int8"],
        ["--engine", "ort", "--max-batch", "0"],
        ["--engine", "ort", "--defer-build"],
        ["--engine", "ort", "--workspace", "64"],
        ["--engine", "ort", "--calibration-samples", "64"],
        ["--engine", "trt", "--threads", "2"],
        ["--engine", "ort", "a.pt", "b.pt"],
    ],
)
def test_usage_errors(workshop: Path, arguments: list[str]) -> None:
    before = files_in(workshop)
    assert run("eps-deploy", main, *arguments, cwd=workshop).code == 2
    assert files_in(workshop) == before


def test_a_foreign_or_damaged_compact_network_is_refused(workshop: Path) -> None:
    content = bytearray((workshop / "compact.pt").read_bytes())
    for wrong in (b"", b"PK\x03\x04 some other zip", bytes(content[:-1]), bytes(content[:100])):
        (workshop / "compact.pt").write_bytes(wrong)
        result = deploy(workshop)
        assert result.code == 1
        assert "compact.pt" in result.error
        assert len(result.stderr.splitlines()) == 1
        assert not (workshop / "bundle").exists()


def test_other_data_than_it_was_trained_on_is_refused(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eps_train.data import dataset

    digits = dataset.load("digits")
    other = replace(digits.identity, sha256="0" * 64)
    monkeypatch.setattr(dataset, "load", lambda *_, **__: replace(digits, identity=other))
    result = deploy(workshop)
    assert result.code == 1
    assert "its test images are not those that the checkpoint was tested on" in result.error
    assert not (workshop / "bundle").exists()
