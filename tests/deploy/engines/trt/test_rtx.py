"""The real ONNX parser and the real builder, on the CPU: those of TensorRT for RTX.

They show that an exported network is one that NVIDIA's parser takes in the type that was meant, and
that our calls are the right ones. They show nothing of speed, nor that an engine is right.
"""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any

import pytest

from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt import build as module
from eps_deploy.engines.trt.build import BuildOptions, network_types, parse
from eps_deploy.engines.trt.plan import Host, Plan, PlanMetadata, this_platform
from eps_deploy.precision import PRECISIONS
from tests.deploy.engines.trt.mutation import install, mutated
from tests.deploy.engines.trt.networks import (
    ASYMMETRIC,
    INT32_BIAS,
    every_precision,
    mixed_bf16,
    quantize_as_ort,
)

pytestmark = pytest.mark.trt_rtx

LAYERS = 8  # of a network of depth 8: seven convolutions and the linear layer


@pytest.fixture(scope="module")
def trt() -> Any:
    return importlib.import_module("tensorrt_rtx")


@pytest.fixture(scope="module")
def host(trt: Any) -> Host:
    return Host(
        tensorrt=trt.__version__,
        flavour="tensorrt_rtx",
        compute_capability="12.0",
        device="none",
        memory=0,
        platform=this_platform(),
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """ONNX files by precision, and some that are none."""
    folder = tmp_path_factory.mktemp("onnx")
    files = every_precision(folder)
    fp32 = folder / "fp32.onnx"
    return files | {
        "asymmetric": quantize_as_ort(fp32, folder / "asymmetric.onnx", ASYMMETRIC).read_bytes(),
        "int32 bias": quantize_as_ort(fp32, folder / "bias.onnx", INT32_BIAS).read_bytes(),
        "mixed bf16": mixed_bf16(folder / "mixed.onnx").read_bytes(),
        "garbage": b"garbage " * 100,
        "nothing": b"",
        "cut short": files["fp32"][:5000],
    }


def build(
    trt: Any, host: Host, model: bytes, precision: str, builder: Any = module, **arguments: Any
) -> Plan:
    options = BuildOptions(opt_batch=4, max_batch=8, optimization_level=0)
    built: Plan = builder.build(
        model, PRECISIONS[precision], options, host=host, trt=trt, **arguments
    )
    return built


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_every_precision_builds(
    precision: str, trt: Any, host: Host, models: dict[str, bytes], tmp_path: Path
) -> None:
    phases: set[str] = set()

    def progress(phase: str, done: int, steps: int) -> bool:
        phases.add(phase)
        assert 0 <= done <= steps
        return True

    built = build(trt, host, models[precision], precision, progress=progress)
    assert "Building engine" in phases
    assert built.metadata.flags == (("TF32",) if precision == "tf32" else ())
    built.write(tmp_path)
    assert PlanMetadata.load(tmp_path / "model.plan.json") == built.metadata
    built.metadata.check((tmp_path / "model.plan").read_bytes(), host)
    assert not (tmp_path / "model.plan.layers.json").exists()  # nothing can be loaded here


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_every_product_has_the_type_that_was_asked_for(
    precision: str, trt: Any, models: dict[str, bytes]
) -> None:
    parsed = parse(models[precision], trt)
    choice = PRECISIONS[precision]
    types = network_types(parsed, choice, trt)
    assert len(types) == LAYERS
    assert set(types.values()) == {"int8" if choice.quantized else choice.float}
    assert parsed.input_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("file", "precision"),
    [("fp32", "fp16"), ("fp16", "fp32"), ("fp16", "bf16"), ("fp32", "int8"), ("int8", "int8-fp16")],
)
def test_a_file_of_another_precision_is_refused(
    file: str, precision: str, trt: Any, host: Host, models: dict[str, bytes]
) -> None:
    with pytest.raises(EngineError, match=f"this ONNX file is not of precision {precision}"):
        build(trt, host, models[file], precision)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("asymmetric", "Non-zero zero point is not supported"),
        ("int32 bias", "Int32"),
        ("mixed bf16", "BFloat16"),
        ("garbage", "Failed to parse the ONNX model"),
        ("cut short", "Failed to parse the ONNX model"),
        ("nothing", "its inputs and outputs are none"),
    ],
)
def test_parser_errors_are_one_line_with_the_reason(
    file: str, said: str, trt: Any, host: Host, models: dict[str, bytes]
) -> None:
    with pytest.raises(EngineError, match=said) as caught:
        build(trt, host, models[file], "bf16" if file == "mixed bf16" else "int8")
    assert "\n" not in str(caught.value)


def test_ctrl_c_ends_a_real_build(trt: Any, host: Host, models: dict[str, bytes]) -> None:
    def interrupt(phase: str, done: int, steps: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(trt, host, models["fp32"], "fp32", progress=interrupt)
    assert "tensorrt-build" not in {thread.name for thread in threading.enumerate()}
    assert build(trt, host, models["fp32"], "fp32").content  # and the next one is not harmed


def test_a_silent_monitor_is_noticed(
    trt: Any, host: Host, models: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = mutated(module, ("return not worker.cancelled.is_set()", "return None"))
    install(monkeypatch, module, module, broken)
    with pytest.raises(EngineError, match="cannot build"):
        build(trt, host, models["fp32"], "fp32")


def test_a_removed_flag_is_noticed(trt: Any, host: Host, models: dict[str, bytes]) -> None:
    line = "    _set_flag(config, trt.BuilderFlag.TF32, precision.tf32)"
    broken = mutated(module, (line, "    config.set_flag(trt.BuilderFlag.FP16)\n" + line))
    with pytest.raises(AttributeError, match="FP16"):
        build(trt, host, models["fp32"], "fp32", broken)


def test_unchecked_types_are_noticed(
    trt: Any, host: Host, models: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = mutated(module, ("check_layer_types(network_types", "(lambda *_: None)(network_types"))
    install(monkeypatch, module, module, broken)
    assert build(trt, host, models["fp32"], "fp16").content  # what the check is there to prevent
