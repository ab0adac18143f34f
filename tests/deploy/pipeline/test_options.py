"""What options of eps-deploy reach: ONNX Runtime's sessions, and TensorRT through its fake."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eps_deploy.cli.deploy import main
from eps_deploy.engines.trt import cache
from eps_deploy.pipeline import builder
from eps_deploy.pipeline.options import Options
from eps_deploy.pipeline.pipeline import Deployment, TestSet
from eps_deploy.precision import PRECISIONS
from tests.commands import run
from tests.deploy.engines.trt.builder import FLOAT, HALF, MODEL, Builder
from tests.deploy.engines.trt.contract import VERSIONS, Version


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Options as the command hands them to `pipeline.deploy_files`, by its arguments."""
    given: list[Options] = []

    def deploy(options: Options, say: object) -> None:
        given.append(options)
        raise KeyboardInterrupt

    def parse(*args: object) -> Options:
        monkeypatch.setattr("eps_deploy.pipeline.pipeline.deploy_files", deploy)
        result = run("eps-deploy", main, *args, cwd=tmp_path)
        assert result.code == 130, result.stderr
        return given.pop()

    return parse


class Called(Exception):
    """What something was called with; it ends what called it."""

    def __init__(self, *args: object, **named: object) -> None:
        super().__init__(args, named)
        self.positional, self.named = args, named


def call(*args: object, **named: object) -> Any:
    raise Called(*args, **named)


def test_onnx_runtime_runs_as_asked_for(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "OrtEngine", call)
    nothing: Any = SimpleNamespace(compact=b"", baseline=b"", kept=())
    arguments = ("--engine", "ort", "--provider", "cuda", "--threads", 3, "--tf32")
    with (
        pytest.raises(Called) as caught,
        builder.opened(options(*arguments, "--max-batch", 17), nothing, nothing, print),
    ):
        pass
    expected = {
        "provider": "cuda",
        "threads": 3,
        "precision": PRECISIONS["tf32"],
        "max_batch": 17,
    }
    assert caught.value.named.items() >= expected.items()


def test_latency_is_measured_for_no_longer(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eps_deploy.bench.latency.measure", call)
    variant = SimpleNamespace(engine=object())
    variants: Any = SimpleNamespace(baseline=variant, compact=variant)
    test = TestSet(images=np.zeros((1, 1, 8, 8), np.uint8), labels=np.zeros(1, np.int64))
    data = SimpleNamespace(preprocessing=None, classes=())
    inputs: Any = SimpleNamespace(compact=SimpleNamespace(data=data))
    asked = options("--engine", "ort", "--time-budget", 7.5)
    networks: Any = None
    deployment = Deployment(
        options=asked, inputs=inputs, networks=networks, test=test, log=lambda line: None
    )
    with pytest.raises(Called) as caught:
        deployment.latency(variants)
    assert caught.value.named["budget"] == 7.5


def test_int8_is_calibrated_by_the_method(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def export_onnx(network: object, identity: object, path: Path, **named: object) -> None:
        path.write_bytes(b"")

    monkeypatch.setattr(builder, "export_onnx", export_onnx)
    monkeypatch.setattr(builder, "quantize", call)
    compact = SimpleNamespace(digest="")
    inputs: Any = SimpleNamespace(compact=compact, baseline=compact, blocks=lambda: ())
    network = SimpleNamespace(network=None, identity=None)
    both: Any = SimpleNamespace(compact=network, baseline=network)
    images = np.zeros((1, 1, 8, 8), np.uint8)
    asked = options("--engine", "ort", "--int8", "--calibration-method", "entropy")
    with pytest.raises(Called) as caught:
        builder.export(asked, inputs, both, images)
    assert caught.value.named["method"] == "entropy"


# -- TensorRT --------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds a plan as the command would on a machine with the TensorRT of a `Builder`."""

    def opened(fake: Builder, options: Options) -> Called:
        def cuda(device: int) -> Any:
            return SimpleNamespace(device=device, current=nullcontext)

        def facts(trt: object, cuda: Any) -> Any:
            return replace(fake.host, device=f"GPU {cuda.device}")

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(cache, "load_tensorrt", lambda: fake.trt)
        monkeypatch.setattr(cache, "Cuda", cuda)
        monkeypatch.setattr(cache, "host_facts", facts)
        monkeypatch.setattr(cache, "TrtEngine", call)
        models: Any = SimpleNamespace(compact=MODEL, baseline=MODEL, kept=())
        with pytest.raises(Called) as caught, builder.opened(options, models, models, print):
            pass
        return caught.value

    return opened


both = pytest.mark.parametrize("version", VERSIONS)


@both
def test_tensorrt_builds_as_asked_for(options: Any, machine: Any, version: Version) -> None:
    fake = Builder(version)
    _, metadata = machine(
        fake,
        options(
            *("--engine", "trt", "--workspace", 64, "--optimization-level", 5),
            *("--version-compatible", "--hardware-compatibility", "same-compute-capability"),
            *("--opt-batch", 4, "--max-batch", 8, "--device", 3),
        ),
    ).positional
    (limit,) = [call for call in fake.trt.calls if call.name == "set_memory_pool_limit"]
    assert limit.arguments == (fake.trt.MemoryPoolType.WORKSPACE, 64 << 20)
    assert fake.config.builder_optimization_level == 5
    assert fake.config.hardware_compatibility_level.name == "SAME_COMPUTE_CAPABILITY"
    _, larger = fake.profiles
    assert larger == ("images", (2, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))
    assert metadata.flags == ("VERSION_COMPATIBLE",)
    assert metadata.host.device == "GPU 3"


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
    """A network in other types than those is refused by the same build (`check_layer_types`)."""
    fake = Builder(kinds=kinds, quantized=quantized, information="")
    _, metadata = machine(fake, options("--engine", "trt", *flags)).positional
    assert (metadata.precision, metadata.flags) == (named, built)


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


def test_the_plan_runs_on_the_gpu_asked_for(options: Any, machine: Any) -> None:
    asked = options("--engine", "trt", "--device", 3)
    assert machine(Builder(), asked).named["cuda"].device == 3
    assert asked.gpu == 3


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_limit_is_a_number_of_at_least_0(value: str, tmp_path: Path) -> None:
    for option in ("--max-accuracy-drop", "--max-class-drop", "--min-speedup"):
        result = run("eps-deploy", main, "--engine", "ort", option, value, cwd=tmp_path)
        assert result.code == 1
        assert result.error.startswith(f"eps-deploy: error: {option} ")
        assert result.error.endswith(": give a number of at least 0")
