from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eps_core.errors import ConfigError
from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt import build as module
from eps_deploy.engines.trt.build import BuildOptions
from eps_deploy.engines.trt.plan import HardwareCompatibility, Host, PlanMetadata, Profile
from tests.deploy.engines.trt.builder import PLAN, Builder
from tests.deploy.engines.trt.checks import EVERY_BUILD_CHECK, run
from tests.deploy.engines.trt.contract import VERSIONS, Version

both = pytest.mark.parametrize("version", VERSIONS)


@pytest.mark.parametrize(("check", "version"), EVERY_BUILD_CHECK)
def test_build(check: Callable[..., None], version: Version) -> None:
    check(module, version)


@both
@pytest.mark.parametrize(
    ("opt_batch", "max_batch", "profiles"),
    [
        (4, 8, ((1, 1, 1), (2, 4, 8))),
        (1, 8, ((1, 1, 1), (2, 2, 8))),
        (2, 2, ((1, 1, 1), (2, 2, 2))),
        (1, 1, ((1, 1, 1),)),
    ],
)
def test_one_profile_for_one_image_and_one_for_all_larger_batches(
    version: Version, opt_batch: int, max_batch: int, profiles: tuple[Profile, ...]
) -> None:
    fake = Builder(version)
    options = BuildOptions(opt_batch=opt_batch, max_batch=max_batch)
    built = run(module, fake, options=options)
    assert built.metadata.profiles == profiles
    assert fake.profiles == [
        ("images", *((batch, 3, 8, 8) for batch in profile)) for profile in profiles
    ]


@both
def test_options_reach_tensorrt(version: Version) -> None:
    fake = Builder(version)
    options = BuildOptions(
        workspace=2**30,
        optimization_level=5,
        version_compatible=True,
        hardware_compatibility="same-compute-capability",
    )
    built = run(module, fake, "tf32", options=options)
    assert fake.config.builder_optimization_level == 5
    assert fake.config.hardware_compatibility_level.name == "SAME_COMPUTE_CAPABILITY"
    assert fake.config.profiling_verbosity.name == "DETAILED"
    assert built.metadata.flags == ("TF32", "VERSION_COMPATIBLE")
    (limit,) = [call for call in fake.trt.calls if call.name == "set_memory_pool_limit"]
    assert limit.arguments == (fake.trt.MemoryPoolType.WORKSPACE, 2**30)


@both
def test_tf32_is_off_unless_asked_for(version: Version) -> None:
    assert run(module, Builder(version)).metadata.flags == ()


@both
@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("create_network", "create_network failed for a reason"),
        ("parse", "Non-zero zero point is not supported. (at QuantizeLinear 0007_QuantizeLinear)"),
        ("create_builder_config", "create_builder_config failed for a reason"),
        ("bool", "refuses the batch sizes (1, 1, 1): TensorRT gave no reason"),
        ("add_optimization_profile", "refuses the batch sizes (1, 1, 1): the profile is bad"),
        ("clear_flag", "TensorRT does not clear its flag TF32"),
        ("deserialize_cuda_engine", "does not load the plan that it just built: deserialize_cuda"),
    ],
)
def test_errors_have_the_reason_from_tensorrt_s_log(version: Version, call: str, said: str) -> None:
    with pytest.raises(EngineError) as caught:
        run(module, Builder(version, refuse=(call,)))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_warnings_are_logged_and_all_but_verbose_messages_kept() -> None:
    said: list[str] = []
    built = run(module, Builder(), log=said.append)
    assert said == ["warning: a slow kernel"]
    assert built.metadata.log == ("info: building", "warning: a slow kernel")


@pytest.mark.parametrize(
    ("fake", "why"),
    [
        (Builder(information="{ no JSON"), "gave no usable JSON"),
        (Builder(information='{"Layers": [3]}'), "AttributeError: 'int' object"),
        (Builder(refuse=("create_engine_inspector",)), "gives no inspector"),
    ],
    ids=["not JSON", "no layers", "no inspector"],
)
def test_an_unusable_inspection_keeps_the_plan(fake: Builder, why: str) -> None:
    """It took many minutes, perhaps, and runs whatever its layers are called."""
    said: list[str] = []
    built = run(module, fake, log=said.append)
    assert built.content == PLAN
    assert (built.metadata.layers, built.inspection) == ({}, "")
    assert "the plan is built; which types its layers have is not known" in said[-1]
    assert why in said[-1]


def test_the_gpu_is_made_current_where_the_building_is_done() -> None:
    threads = []

    @contextmanager
    def on_device() -> Iterator[None]:
        threads.append(threading.current_thread())
        yield
        threads.append(threading.current_thread())

    run(module, Builder(), on_device=on_device)
    entered, left = threads
    assert entered is left is not threading.current_thread()


def test_a_version_compatible_plan_is_trusted_when_it_was_just_built() -> None:
    options = BuildOptions(version_compatible=True)
    assert run(module, Builder(), options=options).metadata.layers == {"fp32": 2}


@pytest.mark.parametrize(
    ("precision", "options", "said"),
    [
        ("tf32", {}, "--tf32 needs compute capability 8.0; Tesla T4 has compute capability 7.5"),
        ("bf16", {}, "--bf16 needs compute capability 8.0"),
        ("fp16", {"hardware_compatibility": "ampere-plus"}, "ampere-plus needs compute capability"),
    ],
)
def test_an_unsupported_precision_is_an_error(
    precision: str, options: dict[str, Any], said: str
) -> None:
    fake = Builder()
    fake.host = Host(
        tensorrt="11.4.0.106",
        compute_capability="7.5",
        device="Tesla T4",
        memory=16_000_000_000,
        platform="linux-x86_64",
    )
    with pytest.raises(EngineError, match=said):
        run(module, fake, precision, options=BuildOptions(**options))
    assert not fake.trt.calls


def test_a_level_of_compatibility_that_this_tensorrt_lacks() -> None:
    fake = Builder()
    vars(fake.trt)["HardwareCompatibilityLevel"] = SimpleNamespace()
    with pytest.raises(EngineError, match="--hardware-compatibility ampere-plus: TensorRT"):
        run(module, fake, options=BuildOptions(hardware_compatibility="ampere-plus"))


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"max_batch": 0}, "--max-batch 0"),
        ({"opt_batch": 64}, "--opt-batch 64"),
        ({"workspace": 0}, "--workspace 0"),
        ({"optimization_level": 6}, "--optimization-level 6"),
        ({"hardware_compatibility": "volta"}, "--hardware-compatibility volta"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        BuildOptions(**options)


@pytest.mark.parametrize("compatibility", ["none", "same-compute-capability"])
def test_plan_and_metadata_are_written(
    tmp_path: Path, compatibility: HardwareCompatibility
) -> None:
    fake = Builder()
    built = run(module, fake, options=BuildOptions(hardware_compatibility=compatibility))
    built.write(tmp_path)
    metadata = built.metadata
    assert (tmp_path / "model.plan").read_bytes() == PLAN
    assert PlanMetadata.load(tmp_path / "model.plan.json") == metadata
    assert metadata.hardware_compatibility == compatibility
    assert metadata.layers == {"fp32": 2}
    assert (tmp_path / "model.plan.layers.json").read_text() == built.inspection
    metadata.check(PLAN, fake.host)


def test_a_full_disk_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Builder()
    built = run(module, fake)
    (tmp_path / "model.plan").write_bytes(b"the old one")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        built.write(tmp_path)
    assert caught.value.filename == str(tmp_path / "model.plan")
    assert [path.name for path in tmp_path.iterdir()] == ["model.plan"]
    assert (tmp_path / "model.plan").read_bytes() == b"the old one"
