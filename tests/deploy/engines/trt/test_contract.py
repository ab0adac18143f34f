"""The contract fake refuses what the bindings refuse: shown on those that can be had here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from eps_deploy.engines.trt.plan import logger_of
from tests.deploy.engines.trt.builder import Builder
from tests.deploy.engines.trt.contract import VERSIONS, Version, make_fake

Probe = Callable[[Any, Any, Any], object]  # of the module, a builder and a configuration


def _no_base(trt: Any, builder: Any, config: Any) -> object:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

    return Logger()


def _assign(target: Any, name: str, value: object) -> None:
    setattr(target, name, value)


PROBES: dict[str, Probe] = {
    "None for a logger": lambda trt, builder, config: trt.Builder(None),
    "a flag as an integer": lambda trt, builder, config: config.set_flag(6),
    "a flag's bit": lambda trt, builder, config: 1 << trt.BuilderFlag.TF32,
    "a flag's bit, rightly": lambda trt, builder, config: 1 << int(trt.BuilderFlag.TF32),
    "a removed flag": lambda trt, builder, config: trt.BuilderFlag.FP16,
    "a removed method": lambda trt, builder, config: builder.build_engine,
    "a removed property": lambda trt, builder, config: config.int8_calibrator,
    "a network by a name": lambda trt, builder, config: builder.create_network("strong"),
    "a network by the flag": lambda trt, builder, config: builder.create_network(
        trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    ),
    "a size in floats": lambda trt, builder, config: config.set_memory_pool_limit(
        trt.MemoryPoolType.WORKSPACE, 1e9
    ),
    "a size by its keyword": lambda trt, builder, config: config.set_memory_pool_limit(
        pool=trt.MemoryPoolType.WORKSPACE, pool_size=2**20
    ),
    "an unknown keyword": lambda trt, builder, config: config.set_memory_pool_limit(
        trt.MemoryPoolType.WORKSPACE, size=2**20
    ),
    "too many arguments": lambda trt, builder, config: config.clear_flag(
        trt.BuilderFlag.TF32, True
    ),
    "an unknown attribute": lambda trt, builder, config: _assign(config, "max_workspace_size", 1),
    "a level in words": lambda trt, builder, config: _assign(
        config, "profiling_verbosity", "DETAILED"
    ),
    "a level in floats": lambda trt, builder, config: _assign(
        config, "builder_optimization_level", 3.0
    ),
    "a read-only property": lambda trt, builder, config: _assign(
        config, "num_optimization_profiles", 2
    ),
    "a constructor that is none": lambda trt, builder, config: trt.IHostMemory(),
    "a logger without its base": _no_base,
    "a build without a network": lambda trt, builder, config: builder.build_serialized_network(
        None
    ),
    "a shape in text": lambda trt, builder, config: builder.create_optimization_profile().set_shape(
        "images", "1", "2", "3"
    ),
}


def outcome(trt: Any, builder: Any, config: Any, probe: Probe) -> str:
    try:
        probe(trt, builder, config)
    except Exception as error:
        return type(error).__name__
    return "accepted"


@pytest.mark.trt_rtx
@pytest.mark.parametrize("name", PROBES)
def test_it_refuses_what_the_bindings_refuse(name: str) -> None:
    real = importlib.import_module("tensorrt_rtx")
    outcomes = []
    for trt in (Builder("11.4").trt, real):
        builder = trt.Builder(logger_of(trt))
        outcomes.append(outcome(trt, builder, builder.create_builder_config(), PROBES[name]))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_call_without_behaviour_is_an_error(version: Version) -> None:
    trt = make_fake(version, {})
    with pytest.raises(NotImplementedError, match=r"Builder\.create_network"):
        trt.Builder(logger_of(trt)).create_network(1)


def test_defaults_are_filled_in_and_calls_are_kept() -> None:
    trt = make_fake("11.4", {"Builder": {"create_network": lambda builder, flags: flags}})
    assert trt.Builder(logger_of(trt)).create_network() == 0
    assert trt.calls[-1] == ("Builder", "create_network", (0,))
    assert trt.count("Builder", "create_network") == 1


def test_behaviour_for_what_there_is_not_is_an_error() -> None:
    with pytest.raises(AssertionError):
        make_fake("11.4", {"Builder": {"build_engine": lambda builder: None}})


def test_the_versions_differ_where_it_matters() -> None:
    ten, eleven = (make_fake(version, {}) for version in ("10.16", "11.4"))
    assert hasattr(ten.BuilderFlag, "FP16")
    assert not hasattr(eleven.BuilderFlag, "FP16")
    flags = [int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) for trt in (ten, eleven)]
    assert flags == [1, 0]
