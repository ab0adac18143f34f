from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eps_core.errors import FileFormatError
from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt.plan import PlanMetadata
from tests.deploy.engines.trt.builder import HOST, PLAN

METADATA = PlanMetadata(
    host=HOST,
    onnx_sha256="0" * 64,
    plan_sha256=hashlib.sha256(PLAN).hexdigest(),
    precision="fp16",
    profiles=((1, 1, 1), (2, 16, 32)),
    flags=("TF32",),
    hardware_compatibility="none",
    version_compatible=False,
    layers={"fp16": 30, "fp32": 2},
    seconds=12.5,
    log=("info: done",),
)


def test_a_plan_is_loaded_where_it_was_built() -> None:
    METADATA.check(PLAN, HOST)
    newer_driver = replace(HOST, driver="590.10", cuda="13.1")
    METADATA.check(PLAN, newer_driver)
    assert METADATA.remark(newer_driver) is None


def test_the_error_names_both_machines() -> None:
    here = replace(HOST, tensorrt="10.16.1.11", compute_capability="8.0", device="NVIDIA A100")
    with pytest.raises(EngineError) as caught:
        METADATA.check(PLAN, here)
    assert str(caught.value) == (
        "model.plan: built for TensorRT 11.4.0.106 on compute capability 9.0"
        " (NVIDIA H100 80GB HBM3), linux-x86_64; this machine has TensorRT 10.16.1.11 on compute"
        " capability 8.0 (NVIDIA A100), linux-x86_64; rebuild it with eps-deploy --engine trt"
    )


def test_another_plan_is_refused() -> None:
    with pytest.raises(EngineError, match=r"cache/model\.plan: not the plan that"):
        METADATA.check(PLAN + b"!", HOST, name="cache/model.plan")


@pytest.mark.parametrize(
    "change",
    [
        {"tensorrt": "11.4.0.107"},
        {"compute_capability": "9.1"},
        {"platform": "linux-aarch64"},
        {"flavour": "tensorrt_rtx"},
    ],
)
def test_each_difference_counts(change: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="this machine has"):
        METADATA.check(PLAN, replace(HOST, **change))


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("11.0.0.1", "11.4.0.106", True),
        ("11.4.0.106", "11.4.0.106", True),
        ("11.4.0.106", "11.3.0.1", False),
        ("10.16.1.11", "11.4.0.106", True),
        ("11.4.0.106", "12.0.0.1", False),
        ("11.4.0.106", "10.16.1.11", False),
    ],
)
def test_version_compatible_plans_go_forward_as_nvidia_says(
    built: str, here: str, fits: bool
) -> None:
    metadata = replace(METADATA, host=replace(HOST, tensorrt=built), version_compatible=True)
    if fits:
        metadata.check(PLAN, replace(HOST, tensorrt=here))
    else:
        with pytest.raises(EngineError, match="built for"):
            metadata.check(PLAN, replace(HOST, tensorrt=here))


@pytest.mark.parametrize(
    ("level", "capability", "fits"),
    [
        ("ampere-plus", "8.0", True),
        ("ampere-plus", "12.0", True),
        ("ampere-plus", "7.5", False),
        ("same-compute-capability", "9.0", True),
        ("same-compute-capability", "8.9", False),
    ],
)
def test_hardware_compatible_plans_go_where_nvidia_says(
    level: Any, capability: str, fits: bool
) -> None:
    metadata = replace(METADATA, hardware_compatibility=level)
    here = replace(HOST, compute_capability=capability, device="another")
    if fits:
        metadata.check(PLAN, here)
        assert metadata.remark(here) is None
    else:
        with pytest.raises(EngineError, match="built for"):
            metadata.check(PLAN, here)


def test_another_model_of_the_same_capability_is_remarked() -> None:
    here = replace(HOST, device="NVIDIA H200")
    METADATA.check(PLAN, here)
    assert "was built on NVIDIA H100 80GB HBM3, this is NVIDIA H200" in str(METADATA.remark(here))


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.plan.json"
    path.write_bytes(METADATA.to_json())
    assert PlanMetadata.load(path) == METADATA
    assert json.loads(path.read_text())["host"]["compute_capability"] == "9.0"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file, and a plan is not loaded without it"),
        (b"{", "damaged or not JSON"),
        (b"[]", "not usable plan metadata"),
        (b'{"schema": 3}', "schema 3 is newer"),
        (b'{"schema": 1}', "of an earlier eps-resnet.*rebuild it with eps-deploy --engine trt"),
        (b'{"schema": 2}', "not usable plan metadata"),
        ({"schema": "1"}, "not usable plan metadata"),
        ({"profiles": []}, "not usable plan metadata"),
        ({"profiles": [[1, 16]]}, "not usable plan metadata"),
        ({"profiles": [[1, 16, 8]]}, "not usable plan metadata"),
        ({"profiles": [[1, 1, 1], [3, 4, 8]]}, "not usable plan metadata"),
        ({"profiles": [[1, 1, 1], [1, 4, 8]]}, "not usable plan metadata"),
        ({"profiles": [[2, 4, 8]]}, "not usable plan metadata"),
        ({"profiles": [1, 16, 32]}, "not usable plan metadata"),
        ({"hardware_compatibility": "volta"}, "not usable plan metadata"),
        ({"version_compatible": "no"}, "not usable plan metadata"),
        ({"host": {"tensorrt": "11.4"}}, "not usable plan metadata"),
        ({"layers": ["fp16"]}, "not usable plan metadata"),
    ],
)
def test_damaged_metadata_is_a_one_line_error(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "model.plan.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(METADATA.to_json()), **content}).encode()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileFormatError, match=said) as caught:
        PlanMetadata.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
