"""Each way of breaking the build that was ever thought of must fail a check."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest

from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt import build
from eps_deploy.engines.trt import plan as metadata
from tests.deploy.engines.trt.builder import HOST, PLAN, Builder
from tests.deploy.engines.trt.checks import noticed, run
from tests.deploy.engines.trt.contract import VERSIONS, Version
from tests.deploy.engines.trt.mutation import install, mutated

STRONG = "1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)"
TF32 = "    _set_flag(config, trt.BuilderFlag.TF32, precision.tf32)"

BREAKS: dict[str, tuple[ModuleType, tuple[tuple[str, str], ...]]] = {
    "a None plan written": (
        build,
        (
            (
                'cancelled")\n            if serialized is None:\n',
                'cancelled")\n            if False:\n',
            ),
            ("content = bytes(serialized)", "content = bytes(serialized or b'')"),
        ),
    ),
    "network freed before parsing": (
        build,
        (("trt.OnnxParser(network,", "trt.OnnxParser(builder.create_network(strongly_typed),"),),
    ),
    "parser freed before building": (
        build,
        (("Parsed(builder, network, parser)", "Parsed(builder, network, None)"),),
    ),
    "progress monitor returning None": (
        build,
        (("return not worker.cancelled.is_set()", "return None"),),
    ),
    "progress monitor that never stops": (
        build,
        (("return not worker.cancelled.is_set()", "return True"),),
    ),
    "the flag itself in place of its bit": (
        build,
        ((STRONG, "trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED"),),
    ),
    "a removed flag": (
        build,
        ((TF32, "    config.set_flag(trt.BuilderFlag.FP16)\n" + TF32),),
    ),
    "types not checked": (
        build,
        (("check_layer_types(network_types", "(lambda *_: None)(network_types"),),
    ),
    "no profile": (
        build,
        (("config.add_optimization_profile(profile)", "index"),),
    ),
    "one profile": (build, (("enumerate(options.profiles)", "enumerate(options.profiles[1:])"),)),
    "the profiles in another order": (
        build,
        (("enumerate(options.profiles)", "enumerate(options.profiles[::-1])"),),
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_not_broken_passes(version: Version) -> None:
    assert not noticed(build, version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", BREAKS)
def test_it_is_noticed(name: str, version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    original, edits = BREAKS[name]
    broken = mutated(original, *edits)
    if original is not build:
        install(monkeypatch, build, original, broken)
    assert noticed(broken if original is build else build, version)


def checks_the_metadata(module: ModuleType) -> None:
    """Another plan, another TensorRT, another GPU: none of them is loaded."""
    written = module.PlanMetadata.from_json(run(build, Builder()).metadata.to_json())
    written.check(PLAN, HOST)
    hosts = [replace(HOST, tensorrt="11.5.0.1"), replace(HOST, compute_capability="8.0")]
    for plan, host in [(b"another", HOST), *((PLAN, host) for host in hosts)]:
        with pytest.raises(EngineError, match="rebuild it"):
            written.check(plan, host)


def test_the_metadata_is_checked() -> None:
    checks_the_metadata(metadata)


@pytest.mark.parametrize(
    "edit",
    [
        ("if hashlib.sha256(plan).hexdigest() != self.plan_sha256:", "if False:"),
        ("if not (same and ", "if False and (same and "),
        (" and self._version_fits(host)", ""),
        (" and self._device_fits(host)", ""),
    ],
)
def test_an_unchecked_metadata_is_noticed(edit: tuple[str, str]) -> None:
    with pytest.raises(pytest.fail.Exception):
        checks_the_metadata(mutated(metadata, edit))
