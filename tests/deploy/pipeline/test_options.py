"""What options of eps-deploy reach: ONNX Runtime's sessions, and TensorRT through its fake."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eps_deploy.cli.deploy import main
from eps_deploy.pipeline import build as networks
from eps_deploy.pipeline import build as plans
from eps_deploy.pipeline import build as runtimes
from eps_deploy.pipeline import evaluate
from eps_deploy.pipeline.build import Stages
from eps_deploy.pipeline.options import Options
from tests.commands import run
from tests.deploy.engines.trt.builder import FLOAT, HALF, MODEL, Builder
from tests.deploy.engines.trt.contract import VERSIONS, Version


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Options as the command hands them to `pipeline.deploy`, by its arguments."""
    given: list[Options] = []

    def deploy(options: Options, say: object) -> None:
        given.append(options)
        raise KeyboardInterrupt

    def parse(*args: object) -> Options:
        monkeypatch.setattr("eps_deploy.pipeline.pipeline.deploy", deploy)
        result = run("eps-deploy", main, *args, cwd=tmp_path)
        assert result.code == 130, result.stderr
        return given.pop()

    return parse


class Called(Exception):
    """What something was called with; it ends what called it."""

    def __init__(self, *args: object, **named: object) -> None:
        super().__init__(args, named)
        self.named = named


def call(*args: object, **named: object) -> Any:
    raise Called(*args, **named)


def test_onnx_runtime_runs_as_asked_for(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "OrtEngine", call)
    nothing: Any = SimpleNamespace(compact=b"", baseline=b"")
    arguments = ("--engine", "ort", "--provider", "cuda", "--threads", 3, "--tf32")
    with (
        pytest.raises(Called) as caught,
        runtimes.opened(options(*arguments, "--max-batch", 17), nothing, nothing, nothing, print),
    ):
        pass
    expected = {"provider": "cuda", "threads": 3, "tf32": True, "max_batch": 17}
    assert caught.value.named.items() >= expected.items()


def test_latency_is_measured_for_no_longer(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eps_deploy.bench.latency.measure", call)
    side = SimpleNamespace(engine=object())
    part: Any = SimpleNamespace(images={0: None}, spread=lambda batch: 0)
    sides: Any = SimpleNamespace(baseline=side, compact=side)
    picture: Any = None
    with pytest.raises(Called) as caught:
        evaluate.timed(
            options("--engine", "ort", "--time-budget", 7.5), sides, part, picture, print
        )
    assert caught.value.named["budget"] == 7.5


def test_int8_is_calibrated_by_the_method(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def content(name: str, key: object, make: Callable[[], bytes]) -> bytes:
        return make() if name.startswith("quantize") else b""

    monkeypatch.setattr(networks, "quantize", call)
    compact = SimpleNamespace(data=None, digest="", network=None)
    sources: Any = SimpleNamespace(compact=compact, baseline=compact, blocks=lambda: ())
    both: Any = SimpleNamespace(compact=None, baseline=None)
    stages: Any = SimpleNamespace(content=content)
    images = np.zeros((1, 1, 8, 8), np.uint8)
    asked = options("--engine", "ort", "--int8", "--calibration-method", "entropy")
    with pytest.raises(Called) as caught:
        networks.export(asked, sources, both, images, stages)
    assert caught.value.named["method"] == "entropy"


# -- TensorRT --------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds a plan as the command would on a machine with the TensorRT of a `Builder`."""

    def build(fake: Builder, options: Options) -> plans.Plan:
        def cuda(device: int) -> Any:
            return SimpleNamespace(device=device, current=nullcontext)

        def facts(trt: object, cuda: Any) -> Any:
            return replace(fake.host, device=f"GPU {cuda.device}")

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(plans, "load_tensorrt", lambda: fake.trt)
        monkeypatch.setattr(plans, "Cuda", cuda)
        monkeypatch.setattr(plans, "host_facts", facts)
        stages = Stages(tmp_path / "stages", resume=False)
        return plans.build_plan(options, MODEL, "model", stages, lambda line: None)

    return build


both = pytest.mark.parametrize("version", VERSIONS)


@both
def test_tensorrt_builds_as_asked_for(options: Any, machine: Any, version: Version) -> None:
    fake = Builder(version)
    plan = machine(
        fake,
        options(
            *("--engine", "trt", "--workspace", 64, "--optimization-level", 5),
            *("--version-compatible", "--hardware-compatibility", "same-compute-capability"),
            *("--opt-batch", 4, "--max-batch", 8, "--device", 3),
        ),
    )
    (limit,) = [call for call in fake.trt.calls if call.name == "set_memory_pool_limit"]
    assert limit.arguments == (fake.trt.MemoryPoolType.WORKSPACE, 64 << 20)
    assert fake.config.builder_optimization_level == 5
    assert fake.config.hardware_compatibility_level.name == "SAME_COMPUTE_CAPABILITY"
    assert fake.profile == ("images", (1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))
    assert plan.sidecar.flags == ("VERSION_COMPATIBLE",)
    assert plan.sidecar.host.device == "GPU 3"


@pytest.mark.parametrize(
    ("flags", "kinds", "quantized", "named", "built"),
    [
        (["--fp32"], (FLOAT, FLOAT), False, "fp32", ()),
        (["--tf32"], (FLOAT, FLOAT), False, "tf32", ("TF32",)),
        (["--fp16"], (HALF, HALF), False, "fp16", ()),
        (["--bf16"], ("BF16", "BF16"), False, "bf16", ()),
        (["--int8"], (HALF, HALF), True, "int8-fp16", ()),
    ],
    ids=["--fp32", "--tf32", "--fp16", "--bf16", "--int8"],
)
def test_tensorrt_computes_in_the_precision_asked_for(
    options: Any,
    machine: Any,
    flags: list[str],
    kinds: tuple[str, ...],
    quantized: bool,
    named: str,
    built: tuple[str, ...],
) -> None:
    """A network in other types than those is refused by the same build (`parse.check_types`)."""
    fake = Builder(kinds=kinds, quantized=quantized, information="")
    plan = machine(fake, options("--engine", "trt", *flags))
    assert (plan.sidecar.precision, plan.sidecar.flags) == (named, built)


def test_the_times_of_kernels_are_kept_in_the_folder(
    options: Any, machine: Any, tmp_path: Path
) -> None:
    for times in (b"first", b"second"):
        fake = Builder(cache=times)
        machine(fake, options("--engine", "trt", "--timing-cache", tmp_path / "times"))
    (file,) = (tmp_path / "times").iterdir()
    assert b"second" in file.read_bytes()
    (created,) = [call for call in fake.trt.calls if call.name == "create_timing_cache"]
    assert created.arguments == (b"first",)
    assert not (tmp_path / "cache").exists()


def test_the_plan_runs_on_the_gpu_asked_for(
    options: Any, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options("--engine", "trt", "--device", 3)
    plan = machine(Builder(), asked)
    monkeypatch.setattr(plans, "TrtEngine", call)
    with pytest.raises(Called) as caught:
        plan.open(asked, "model.plan")
    assert caught.value.named["device"] == 3
    assert asked.gpu == 3
