"""What a build must do, as checks on whichever module does it: ours, or one broken on purpose."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt.build import BuildOptions
from eps_deploy.engines.trt.plan import Plan
from eps_deploy.precision import PRECISIONS
from tests.deploy.engines.trt.builder import FLOAT, HALF, MODEL, NEVER, PLAN, Builder
from tests.deploy.engines.trt.contract import VERSIONS, Version


def run(module: ModuleType, fake: Builder, precision: str = "fp32", **arguments: Any) -> Plan:
    """`build` of `module` on a fake TensorRT."""
    options = arguments.pop("options", BuildOptions(opt_batch=4, max_batch=8))
    built: Plan = module.build(
        MODEL, PRECISIONS[precision], options, host=fake.host, trt=fake.trt, **arguments
    )
    return built


def builds(module: ModuleType, version: Version) -> None:
    """A plan comes out, of a strongly typed network."""
    fake = Builder(version)
    assert run(module, fake).content == PLAN
    assert [[shape[0] for shape in shapes] for _, *shapes in fake.profiles] == [
        [1, 1, 1],
        [2, 4, 8],
    ]
    (call,) = [call for call in fake.trt.calls if call[:2] == ("Builder", "create_network")]
    assert call.arguments == (1 << int(fake.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),)


def builds_fp16(module: ModuleType, version: Version) -> None:
    fake = Builder(version, kinds=(HALF, HALF))
    assert run(module, fake, "fp16").metadata.layers == {"fp16": 2}


def refuses_float_convolutions(module: ModuleType, version: Version) -> None:
    with pytest.raises(EngineError, match="layer 0001_Conv computes in float32, not in float16"):
        run(module, Builder(version, kinds=(HALF, FLOAT, HALF)), "fp16")


def refuses_no_plan(module: ModuleType, version: Version) -> None:
    """A build that fails gives None and says why in the log alone."""
    with pytest.raises(EngineError) as caught:
        run(module, Builder(version, refuse=("build_serialized_network",)))
    assert str(caught.value) == (
        "TensorRT cannot build the engine: build_serialized_network failed for a reason"
    )


def ctrl_c_ends_it(module: ModuleType, version: Version) -> None:
    """The build is cancelled between two steps, and Ctrl-C is raised again."""

    def interrupt(phase: str, done: int, steps: int) -> bool:
        raise KeyboardInterrupt

    fake = Builder(version, steps=NEVER)
    with pytest.raises(KeyboardInterrupt):
        run(module, fake, progress=interrupt)
    assert not fake.finished


BUILD_CHECKS = (builds, builds_fp16, refuses_float_convolutions, refuses_no_plan, ctrl_c_ends_it)


EVERY_BUILD_CHECK = [
    pytest.param(check, version, id=f"{check.__name__}-{version}")
    for version in VERSIONS
    for check in BUILD_CHECKS
]


def noticed(module: ModuleType, version: Version) -> bool:
    """Whether any check on a build fails with `module`."""
    for check in BUILD_CHECKS:
        try:
            check(module, version)
        except (Exception, pytest.fail.Exception):
            return True
    return False
