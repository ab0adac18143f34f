"""Building with TensorRT itself, on the GPU that runs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eps_deploy.engines.trt.build import BuildOptions, build, count_layer_types
from eps_deploy.engines.trt.cuda import Cuda, host_facts
from eps_deploy.engines.trt.plan import (
    AMPERE,
    HardwareCompatibility,
    Host,
    Plan,
    PlanMetadata,
    load_tensorrt,
)
from eps_deploy.precision import PRECISIONS
from tests.deploy.engines.trt.networks import every_precision

pytestmark = pytest.mark.gpu

OPTIONS = BuildOptions(opt_batch=4, max_batch=8)
KINDS = {"fp16": "fp16", "bf16": "bf16", "int8": "int8", "int8-fp16": "int8"}


@pytest.fixture(scope="module")
def trt() -> Any:
    return load_tensorrt()


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    return Cuda()


@pytest.fixture(scope="module")
def host(trt: Any, cuda: Cuda) -> Host:
    return host_facts(trt, cuda)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return every_precision(tmp_path_factory.mktemp("onnx"))


def built(
    models: dict[str, bytes],
    precision: str,
    trt: Any,
    cuda: Cuda,
    host: Host,
    options: BuildOptions = OPTIONS,
    **arguments: Any,
) -> Plan:
    return build(
        models[precision],
        PRECISIONS[precision],
        options,
        host=host,
        trt=trt,
        on_device=cuda.current,
        **arguments,
    )


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_the_engine_computes_in_what_was_asked_for(
    precision: str, trt: Any, cuda: Cuda, host: Host, models: dict[str, bytes], tmp_path: Path
) -> None:
    if host.capability < AMPERE and precision in ("tf32", "bf16"):
        pytest.skip(f"{host.device} has no {precision}")
    result = built(models, precision, trt, cuda, host)
    result.write(tmp_path)
    assert PlanMetadata.load(tmp_path / "model.plan.json") == result.metadata
    result.metadata.check((tmp_path / "model.plan").read_bytes(), host)
    kinds = count_layer_types(result.inspection)
    assert KINDS.get(precision, "fp32") in kinds, result.inspection


def test_the_timing_cache_is_taken_up(
    trt: Any, cuda: Cuda, host: Host, models: dict[str, bytes], tmp_path: Path
) -> None:
    options = replace(OPTIONS, timing_cache=tmp_path)
    said: list[str] = []
    built(models, "fp16", trt, cuda, host, options, log=said.append)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size > 0
    built(models, "fp16", trt, cuda, host, options, log=said.append)
    assert not [line for line in said if str(tmp_path) in line]


@pytest.mark.parametrize("level", ["ampere-plus", "same-compute-capability"])
def test_compatible_plans_build_and_load(
    level: HardwareCompatibility, trt: Any, cuda: Cuda, host: Host, models: dict[str, bytes]
) -> None:
    if level == "ampere-plus" and host.capability < AMPERE:
        pytest.skip(f"{host.device} is older than Ampere")
    options = replace(OPTIONS, version_compatible=True, hardware_compatibility=level)
    result = built(models, "fp16", trt, cuda, host, options)
    assert "VERSION_COMPATIBLE" in result.metadata.flags
    assert result.inspection


def test_ctrl_c_ends_the_build(trt: Any, cuda: Cuda, host: Host, models: dict[str, bytes]) -> None:
    def interrupt(phase: str, done: int, steps: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built(models, "fp32", trt, cuda, host, progress=interrupt)
    assert built(models, "fp32", trt, cuda, host).content
