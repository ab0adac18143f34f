"""Plan cache of the server: plans are built once, kept, checked, and never in the bundle.

TensorRT and the GPU are those of the tests of running plans; the build itself is tested with them.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eps_core import files
from eps_core.errors import ConfigError, FileFormatError
from eps_deploy.bundle import Bundle, encode_manifest, load_bundle
from eps_deploy.engines.base import Engine, EngineError
from eps_deploy.engines.trt import cache as plan_cache
from eps_deploy.engines.trt.build import BuildOptions
from eps_deploy.engines.trt.cache import PlanCache
from eps_deploy.engines.trt.plan import Plan, PlanMetadata
from eps_deploy.pipeline import builder
from eps_deploy.pipeline.options import Options
from eps_deploy.precision import PRECISIONS
from eps_deploy.serving.batching import Batching
from eps_deploy.serving.model import (
    ModelSource,
    build_options,
    open_instance,
    open_model,
    read_bundle,
)
from tests.commands import files_in
from tests.deploy.engines.trt.machine import Machine
from tests.deploy.engines.trt.semantic_fake import make_plan


def defer(folder: Path, **changes: Any) -> Bundle:
    """Make of a bundle what `eps-deploy --engine trt --defer-build` makes."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engine"] = {
        **builder.deferred_engine(Options(model=folder, engine="trt")),
        "file": "model.onnx",
        **changes,
    }
    fields = {k: v for k, v in manifest.items() if k not in ("format", "schema", "digest")}
    (folder / "manifest.json").write_bytes(encode_manifest(fields))
    return load_bundle(folder)


class Builds:
    """Stands in for TensorRT's builder; counts, and can be told to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.options: Any = None
        self.kept: Any = None
        self.during: Callable[[Any], None] = lambda progress: None
        monkeypatch.setattr(plan_cache, "build", self.build)

    def build(self, model: bytes, precision: Any, options: Any, **given: Any) -> Plan:
        self.count += 1
        self.options, self.kept = options, given["kept"]
        self.during(given["progress"])
        plan = make_plan(model, profiles=options.profiles)
        metadata = PlanMetadata(
            host=given["host"],
            onnx_sha256=hashlib.sha256(model).hexdigest(),
            plan_sha256=hashlib.sha256(plan).hexdigest(),
            precision=precision.name,
            profiles=options.profiles,
            flags=(),
            hardware_compatibility=options.hardware_compatibility,
            version_compatible=options.version_compatible,
            layers={},
            seconds=1.0,
            log=(),
        )
        return Plan(content=plan, metadata=metadata)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(monkeypatch)


def cache(folder: Path, machine: Machine, said: list[str] | None = None) -> PlanCache:
    return PlanCache(
        folder, log=print if said is None else said.append, trt=machine.trt, cuda=machine.cuda
    )


def opened(plans: PlanCache, bundle: Bundle, file: str = "model.onnx") -> Engine:
    """As a server opens a deferred bundle."""
    precision = PRECISIONS[bundle.manifest["precision"]]
    return plans.open(plans.plan(bundle.read(file), precision, build_options(bundle)))


def test_built_once_and_then_taken_from_the_cache(
    bundle: Path, tmp_path: Path, builds: Builds
) -> None:
    deferred = defer(bundle, max_batch=8, opt_batch=4, optimization_level=5)
    before = files_in(bundle)
    said: list[str] = []
    for _ in range(2):
        with opened(cache(tmp_path / "cache", Machine(), said), deferred) as engine:
            assert engine.max_batch == 8
            assert engine.describe()["name"] == "trt"
    assert builds.count == 1
    assert builds.options.optimization_level == 5
    assert said[0] == "building model.plan, which takes from seconds to many minutes"
    assert said[-1] == "the plan is in the cache"
    assert files_in(bundle) == before


def test_the_unpruned_network_gets_a_plan_of_its_own(
    bundle: Path, tmp_path: Path, builds: Builds
) -> None:
    """For `--shadow baseline`: built as the other one is, and kept beside it."""
    deferred = defer(bundle)
    for file in ("model.onnx", "baseline.onnx", "baseline.onnx", "model.onnx"):
        with opened(cache(tmp_path / "cache", Machine()), deferred, file):
            pass
    assert builds.count == 2
    kept = {json.loads(path.read_text())["onnx_sha256"] for path in tmp_path.rglob("*.plan.json")}
    networks = [(bundle / name).read_bytes() for name in ("model.onnx", "baseline.onnx")]
    assert kept == {hashlib.sha256(content).hexdigest() for content in networks}


def test_what_does_not_fit_is_built_anew(bundle: Path, tmp_path: Path, builds: Builds) -> None:
    machine, folder = Machine(), tmp_path / "cache"
    with opened(cache(folder, machine), defer(bundle)):
        pass
    with opened(cache(folder, machine), defer(bundle, max_batch=16)):
        assert builds.count == 2  # built in another way
    with opened(cache(folder, Machine(version="10.16")), defer(bundle)):
        assert builds.count == 3  # another TensorRT
    with opened(cache(folder, machine), defer(bundle)):
        assert builds.count == 3


@pytest.mark.parametrize("name", ["model.plan", "model.plan.json"])
@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b""])
def test_a_damaged_cache_is_seen(
    bundle: Path, tmp_path: Path, builds: Builds, name: str, damage: Any
) -> None:
    deferred = defer(bundle)
    said: list[str] = []
    with opened(cache(tmp_path, Machine()), deferred):
        pass
    (found,) = tmp_path.glob(f"plan-*/{name}")
    found.write_bytes(damage(found.read_bytes()))
    with opened(cache(tmp_path, Machine(), said), deferred):
        assert builds.count == 2
    assert any("is not used, and built again" in line for line in said)


def test_a_plan_of_an_earlier_format_is_built_anew(
    bundle: Path, tmp_path: Path, builds: Builds
) -> None:
    """One that an earlier version left in this place of the cache, with a single profile."""
    deferred = defer(bundle)
    said: list[str] = []
    with opened(cache(tmp_path, Machine()), deferred):
        pass
    (found,) = tmp_path.glob("plan-*/model.plan.json")
    old = json.loads(found.read_text())
    old |= {"schema": 1, "profile": [1, 16, 32]}
    del old["profiles"]
    found.write_text(json.dumps(old))
    with opened(cache(tmp_path, Machine(), said), deferred):
        assert builds.count == 2
    assert any("of an earlier eps-resnet" in line and "built again" in line for line in said)
    assert json.loads(found.read_text())["profiles"] == [[1, 1, 1], [2, 16, 32]]


def test_the_place_in_the_cache_depends_on_the_profiles(
    bundle: Path, tmp_path: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    deferred = defer(bundle)
    with opened(cache(tmp_path, Machine()), deferred):
        pass
    monkeypatch.setattr(BuildOptions, "profiles", ((1, 1, 1), (2, 8, 8), (9, 16, 32)))
    with opened(cache(tmp_path, Machine()), deferred):
        assert builds.count == 2
    assert len([*tmp_path.glob("plan-*")]) == 2


def test_two_servers_build_one_plan(bundle: Path, tmp_path: Path, builds: Builds) -> None:
    """The second one waits, and takes what the first has built."""
    deferred = defer(bundle)
    said: list[str] = []
    others: list[threading.Thread] = []

    def second() -> None:
        with opened(cache(tmp_path, Machine(), said), deferred):
            pass

    def during(progress: Any) -> None:
        others.append(threading.Thread(target=second))
        others[0].start()
        while not said:
            pass

    builds.during = during
    plan_cache._POLL, before = 0.01, plan_cache._POLL
    try:
        with opened(cache(tmp_path, Machine()), deferred):
            pass
        others[0].join(60)
    finally:
        plan_cache._POLL = before
    assert builds.count == 1
    assert said == [
        "another server is building this plan; waiting for it",
        "the plan is in the cache",
    ]


def test_a_build_is_called_off_when_the_server_ends(
    bundle: Path, tmp_path: Path, builds: Builds
) -> None:
    stop, machine = threading.Event(), Machine()
    went_on = []

    def during(progress: Any) -> None:
        went_on.append(progress("phase", 1, 3))
        stop.set()
        went_on.append(progress("phase", 2, 3))
        raise EngineError("the build was cancelled")

    builds.during = during
    plans = PlanCache(tmp_path, log=print, stop=stop, trt=machine.trt, cuda=machine.cuda)
    with pytest.raises(EngineError, match="cancelled"):
        opened(plans, defer(bundle))
    assert went_on == [True, False]
    (place,) = tmp_path.glob("plan-*")
    assert list(place.iterdir()) == []
    files.release(files.acquire(place, "still locked"))


def test_a_manifest_that_does_not_say_how(bundle: Path, tmp_path: Path, builds: Builds) -> None:
    for wrong in ({"opt_batch": 0}, {"opt_batch": "x"}, {"hardware_compatibility": "any"}):
        with pytest.raises(FileFormatError, match="does not say how to build"):
            opened(cache(tmp_path, Machine()), defer(bundle, **wrong))
    assert builds.count == 0


def test_a_cache_must_be_named(bundle: Path) -> None:
    assert defer(bundle).manifest["engine"]["deferred"]
    with pytest.raises(ConfigError, match="--engine-cache DIR"):
        read_bundle(bundle, None)


def test_the_build_knows_the_blocks_that_repair_kept(
    bundle: Path, tmp_path: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their layers may be in float32, which the type check of the build refuses otherwise."""
    Machine().install(monkeypatch)
    report = json.loads((bundle / "report.json").read_text())
    report["precision"]["kept"] = ["stages.0.0"]
    content = json.dumps(report).encode()
    (bundle / "report.json").write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text())
    listed = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest["files"]["report.json"] = listed
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    source = ModelSource(path=bundle, engine_cache=tmp_path / "cache")
    open_instance(defer(bundle), source, log=print, stop=threading.Event()).__exit__()
    assert list(builds.kept) == ["stages.0.0"]


@pytest.mark.parametrize(("asked", "instances"), [(1, 1), (3, 3), (None, 2)])
def test_instances_are_contexts_of_one_engine(
    bundle: Path,
    tmp_path: Path,
    builds: Builds,
    monkeypatch: pytest.MonkeyPatch,
    asked: int | None,
    instances: int,
) -> None:
    machine = Machine()
    machine.install(monkeypatch)
    source = ModelSource(
        path=bundle, engine_cache=tmp_path / "cache", batching=Batching(instances=asked)
    )
    deferred = defer(bundle, max_batch=8, opt_batch=4)
    model = open_model(deferred, source, log=print, stop=threading.Event())
    assert len(model.engines) == instances
    assert len(set(map(id, model.engines))) == 1
    assert model.engines[0].describe()["contexts"] == instances
    made = machine.trt.count("ICudaEngine", "create_execution_context")
    assert made == 4 * instances  # each has all of its graphs before the first request
    assert machine.trt.count("Runtime", "deserialize_cuda_engine") == 1
    model.close()
    machine.gpu.check_clean()


def test_a_plan_that_answers_wrongly_is_not_served(
    bundle: Path, tmp_path: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of a first start: built, proven on the stored samples, served; or not served."""
    machine = Machine()
    machine.install(monkeypatch)

    def start(deferred: Bundle) -> Any:
        source = ModelSource(
            path=bundle, engine_cache=tmp_path / "cache", batching=Batching(instances=1)
        )
        return open_model(deferred, source, log=lambda line: None, stop=threading.Event())

    model = start(defer(bundle))
    assert model.platform == "tensorrt_plan"
    assert model.card["proof"]["difference"] < 1e-4
    model.close()
    right = builds.build

    def wrong(model: bytes, *arguments: Any, **given: Any) -> Plan:
        other = (bundle / "baseline.onnx").read_bytes()
        built = right(other, *arguments, **given)
        digest = hashlib.sha256(model).hexdigest()
        return replace(built, metadata=replace(built.metadata, onnx_sha256=digest))

    monkeypatch.setattr(plan_cache, "build", wrong)
    with pytest.raises(EngineError, match="on the stored samples the engine differs from torch"):
        start(defer(bundle, optimization_level=4))
