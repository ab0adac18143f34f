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
from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt.build import Built
from eps_deploy.pipeline import build
from eps_deploy.pipeline.options import Options
from eps_deploy.serving import model as plan_cache
from eps_deploy.serving.model import Gpu, PlanCache, is_deferred, open_model, read_bundle
from tests.commands import files_in
from tests.deploy.engines.trt.machine import Machine
from tests.deploy.engines.trt.semantic_fake import make_plan


def defer(folder: Path, **changes: Any) -> Bundle:
    """Make of a bundle what `eps-deploy --engine trt --defer-build` makes."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engine"] = {
        "name": "trt",
        "runtime": "tensorrt",
        "deferred": True,
        "file": "model.onnx",
        **build.wishes(Options(model=folder)),
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
        self.during: Callable[[Any], None] = lambda progress: None
        monkeypatch.setattr(plan_cache, "build", self.build)

    def build(self, model: bytes, precision: Any, options: Any, **given: Any) -> Built:
        self.count += 1
        self.options = options
        self.during(given["progress"])
        profile = (1, options.opt_batch, options.max_batch)
        plan = make_plan(model, profile=profile)
        facts = {
            "onnx_sha256": hashlib.sha256(model).hexdigest(),
            "plan_sha256": hashlib.sha256(plan).hexdigest(),
            "precision": precision.name,
            "profile": profile,
            "flags": (),
            "hardware_compatibility": options.hardware_compatibility,
            "version_compatible": options.version_compatible,
            "layers": {},
            "seconds": 1.0,
            "log": (),
            "information": "",
        }
        return Built(plan, facts)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(monkeypatch)


def cache(folder: Path, machine: Machine, said: list[str] | None = None) -> PlanCache:
    gpu = Gpu(trt=machine.trt, cuda=machine.cuda)
    said = [] if said is None else said
    return PlanCache(folder, say=said.append, stop=threading.Event(), gpu=gpu)


def test_built_once_and_then_taken_from_the_cache(
    bundle: Path, tmp_path: Path, builds: Builds
) -> None:
    deferred = defer(bundle, max_batch=8, opt_batch=4, optimization_level=5)
    before = files_in(bundle)
    said: list[str] = []
    for _ in range(2):
        with cache(tmp_path / "cache", Machine(), said).open(deferred) as engine:
            assert engine.max_batch == 8
            assert engine.describe()["name"] == "trt"
    assert builds.count == 1
    assert builds.options.optimization_level == 5
    assert said[-1] == "the plan is in the cache"
    assert files_in(bundle) == before


def test_the_unpruned_network_gets_a_plan_of_its_own(
    bundle: Path, tmp_path: Path, builds: Builds
) -> None:
    """For `--shadow baseline`: built as the other one is, and kept beside it."""
    deferred = defer(bundle)
    for file in ("model.onnx", "baseline.onnx", "baseline.onnx", "model.onnx"):
        with cache(tmp_path / "cache", Machine()).open(deferred, file):
            pass
    assert builds.count == 2
    kept = {json.loads(path.read_text())["onnx_sha256"] for path in tmp_path.rglob("*.plan.json")}
    networks = [(bundle / name).read_bytes() for name in ("model.onnx", "baseline.onnx")]
    assert kept == {hashlib.sha256(content).hexdigest() for content in networks}


def test_what_does_not_fit_is_built_anew(bundle: Path, tmp_path: Path, builds: Builds) -> None:
    machine, folder = Machine(), tmp_path / "cache"
    with cache(folder, machine).open(defer(bundle)):
        pass
    with cache(folder, machine).open(defer(bundle, max_batch=16)):
        assert builds.count == 2  # built in another way
    with cache(folder, Machine(version="10.16")).open(defer(bundle)):
        assert builds.count == 3  # another TensorRT
    with cache(folder, machine).open(defer(bundle)):
        assert builds.count == 3


@pytest.mark.parametrize("name", ["model.plan", "model.plan.json"])
@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b""])
def test_a_damaged_cache_is_seen(
    bundle: Path, tmp_path: Path, builds: Builds, name: str, damage: Any
) -> None:
    deferred = defer(bundle)
    said: list[str] = []
    with cache(tmp_path, Machine()).open(deferred):
        pass
    (found,) = tmp_path.glob(f"plan-*/{name}")
    found.write_bytes(damage(found.read_bytes()))
    with cache(tmp_path, Machine(), said).open(deferred):
        assert builds.count == 2
    assert any("is not used, and built again" in line for line in said)


def test_two_servers_build_one_plan(bundle: Path, tmp_path: Path, builds: Builds) -> None:
    """The second one waits, and takes what the first has built."""
    deferred = defer(bundle)
    said: list[str] = []
    others: list[threading.Thread] = []

    def second() -> None:
        with cache(tmp_path, Machine(), said).open(deferred):
            pass

    def during(progress: Any) -> None:
        others.append(threading.Thread(target=second))
        others[0].start()
        while not said:
            pass

    builds.during = during
    plan_cache._POLL, before = 0.01, plan_cache._POLL
    try:
        with cache(tmp_path, Machine()).open(deferred):
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
        raise EngineError("the build was called off")

    builds.during = during
    gpu = Gpu(trt=machine.trt, cuda=machine.cuda)
    plans_here = PlanCache(tmp_path, say=lambda line: None, stop=stop, gpu=gpu)
    with pytest.raises(EngineError, match="called off"):
        plans_here.open(defer(bundle))
    assert went_on == [True, False]
    (place,) = tmp_path.glob("plan-*")
    assert list(place.iterdir()) == []
    files.release(files.acquire(place, "still locked"))


def test_a_manifest_that_does_not_say_how(bundle: Path, tmp_path: Path, builds: Builds) -> None:
    for wrong in ({"opt_batch": 0}, {"opt_batch": "x"}, {"hardware_compatibility": "any"}):
        with pytest.raises(FileFormatError, match="does not say how to build"):
            cache(tmp_path, Machine()).open(defer(bundle, **wrong))
    assert builds.count == 0


def test_a_cache_must_be_named(bundle: Path) -> None:
    assert is_deferred(defer(bundle))
    with pytest.raises(ConfigError, match="--engine-cache DIR"):
        read_bundle(bundle, None)


def test_a_plan_that_answers_wrongly_is_not_served(
    bundle: Path, tmp_path: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of a first start: built, proven on the stored samples, served; or not served."""
    machine = Machine()
    gpu = Gpu(trt=machine.trt, cuda=machine.cuda)
    monkeypatch.setattr(Gpu, "first", classmethod(lambda cls: gpu))

    def start(deferred: Bundle) -> Any:
        return open_model(
            deferred,
            instances=1,
            provider="auto",
            max_images=256,
            engine_cache=tmp_path / "cache",
            log=lambda line: None,
            stop=threading.Event(),
        )

    model = start(defer(bundle))
    assert model.platform == "tensorrt_plan"
    assert model.card["proof"]["difference"] < 1e-4
    model.close()
    right = builds.build

    def wrong(model: bytes, *arguments: Any, **given: Any) -> Built:
        other = (bundle / "baseline.onnx").read_bytes()
        built = right(other, *arguments, **given)
        return replace(
            built, facts={**built.facts, "onnx_sha256": hashlib.sha256(model).hexdigest()}
        )

    monkeypatch.setattr(plan_cache, "build", wrong)
    with pytest.raises(EngineError, match="on the stored samples the engine differs from torch"):
        start(defer(bundle, optimization_level=4))
