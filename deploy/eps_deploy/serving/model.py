"""Open the engines of a bundle for serving, warm and proven."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eps_core import files
from eps_core.checks import Parity
from eps_core.errors import ConfigError, EpsError, FileFormatError
from eps_deploy.bundle import ONNX, Bundle, Choice, load_bundle, open_engine, open_served, prove
from eps_deploy.engines.base import Engine, EngineError
from eps_deploy.engines.trt.build import BuildOptions, build, write_plan
from eps_deploy.engines.trt.cuda import Cuda, host_facts
from eps_deploy.engines.trt.engine import TrtEngine
from eps_deploy.engines.trt.plan import PLAN, SIDECAR, PlanMetadata, load_tensorrt
from eps_deploy.precision import PRECISIONS
from eps_deploy.serving.limits import Limits
from eps_deploy.serving.protocol import Signature, decode_image

# -- A bundle whose plan was left to the machine that serves it: built once, kept, checked again
#
# `--engine-cache` holds one folder for each network, way of building, TensorRT and GPU. The bundle
# itself is never changed: it may be mounted read-only and shared.

Log = Callable[[str], None]
_DIGITS = 16  # hexadecimal, of the key in a folder's name
_POLL = 1.0  # seconds between looks at another server that builds the same plan
_TIMES = "timing"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """What plans are built and run with; the fields are given by tests alone."""

    trt: Any
    cuda: Cuda

    @classmethod
    def first(cls) -> Gpu:
        """TensorRT and the first GPU. Raises EngineError where one is missing."""
        return cls(trt=load_tensorrt(), cuda=Cuda(0))


class PlanCache:
    """Plans in a folder.

    Args:
        folder: as `--engine-cache`.
        say: told what is being done.
        stop: when set, a build that is under way is called off.
        gpu: None: this machine's.
    """

    def __init__(
        self, folder: Path, *, say: Log, stop: threading.Event, gpu: Gpu | None = None
    ) -> None:
        self._folder = folder
        self._say = say
        self._stop = stop
        self._gpu = Gpu.first() if gpu is None else gpu
        self._host = host_facts(self._gpu.trt, self._gpu.cuda)

    def open(self, bundle: Bundle, file: str = ONNX) -> Engine:
        """The engine of a bundle with a deferred plan, built now if it was not built before.

        `file` names the network in the bundle.

        Raises:
            EngineError: TensorRT cannot build or load it.
            OSError: the folder cannot be written.
        """
        model = bundle.read(file)
        place = self._place(bundle, model)
        lock = self._lock(place)
        try:
            found = self._kept(place, model)
            plan, sidecar = found or self._build(place, bundle, model)
        finally:
            files.release(lock)
        if remark := sidecar.remark(self._host):
            self._say(remark)
        return TrtEngine(plan, sidecar, trt=self._gpu.trt, cuda=self._gpu.cuda)

    def _place(self, bundle: Bundle, model: bytes) -> Path:
        wishes = bundle.manifest["engine"]
        key = {
            "onnx": hashlib.sha256(model).hexdigest(),
            "precision": bundle.manifest["precision"],
            "options": {field.name: wishes.get(field.name) for field in fields(BuildOptions)},
            "tensorrt": [self._host.flavour, self._host.tensorrt],
            "device": [self._host.device, self._host.compute_capability, self._host.platform],
        }
        text = json.dumps(key, sort_keys=True).encode()
        return self._folder / f"plan-{hashlib.sha256(text).hexdigest()[:_DIGITS]}"

    def _lock(self, place: Path) -> int | None:
        """The folder for this process alone; waits while another one builds there."""
        told = False
        while not self._stop.is_set():
            try:
                return files.acquire(place, "another server is building this plan")
            except ConfigError as busy:
                if not told:
                    self._say(f"{busy}; waiting for it")
                    told = True
                time.sleep(_POLL)
        raise EngineError("the build was called off")

    def _kept(self, place: Path, model: bytes) -> tuple[bytes, PlanMetadata] | None:
        """What is in the cache, if it is whole and for this machine."""
        if not (place / SIDECAR).exists():
            return None
        try:
            sidecar = PlanMetadata.load(place / SIDECAR)
            plan = (place / PLAN).read_bytes()
            sidecar.check(plan, self._host, name=str(place / PLAN))
            if sidecar.onnx_sha256 != hashlib.sha256(model).hexdigest():
                raise FileFormatError(f"{place}: built from another network")
        except (EpsError, OSError) as error:
            self._say(f"the plan in the cache is not used, and built again: {error}")
            return None
        self._say("the plan is in the cache")
        return plan, sidecar

    def _build(self, place: Path, bundle: Bundle, model: bytes) -> tuple[bytes, PlanMetadata]:
        self._say("building the plan, which takes from seconds to many minutes")
        built = build(
            model,
            PRECISIONS[bundle.manifest["precision"]],
            _options(bundle, self._folder / _TIMES),
            host=self._host,
            progress=lambda *_: not self._stop.is_set(),
            say=self._say,
            trt=self._gpu.trt,
            on_device=self._gpu.cuda.current,
        )
        sidecar = write_plan(place, built, self._host)
        self._say(f"built the plan in {sidecar.seconds:.1f} s")
        return built.plan, sidecar


def _options(bundle: Bundle, timing_cache: Path) -> BuildOptions:
    """How `eps-deploy` was told to build. Raises FileFormatError for a manifest that says less."""
    recorded = bundle.manifest["engine"]
    names = [field.name for field in fields(BuildOptions) if field.name != "timing_cache"]
    try:
        return BuildOptions(timing_cache=timing_cache, **{name: recorded[name] for name in names})
    except (KeyError, TypeError, ConfigError) as error:
        raise FileFormatError(
            f"{bundle.root}: the manifest does not say how to build the plan ({error!r});"
            " run eps-deploy again"
        ) from error


REPORT = "report.json"
VERSION = "1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A loaded bundle.

    Attributes:
        bundle: verified.
        engines: one for each instance.
        signature: for the protocol.
        platform: Triton's name of it, `onnxruntime_onnx` or `tensorrt_plan`.
        max_batch: the engine's largest batch.
        card: the model card, plain data for the page: facts of the network and of its report.
    """

    bundle: Bundle
    engines: tuple[Engine, ...]
    signature: Signature
    platform: str
    max_batch: int
    card: dict[str, Any]

    def close(self) -> None:
        with ExitStack() as stack:
            for engine in self.engines:
                stack.push(engine.__exit__)


def read_bundle(path: Path, engine_cache: Path | None) -> Bundle:
    """Read and verify a bundle. Raises FileFormatError; ConfigError: it needs an engine cache."""
    bundle = load_bundle(path)
    if is_deferred(bundle) and engine_cache is None:
        raise ConfigError(
            f"{path}: its plan is still to be built, on this machine; name a folder for it with"
            " --engine-cache DIR"
        )
    return bundle


def is_deferred(bundle: Bundle) -> bool:
    """Whether the plan was left to the server (`eps-deploy --defer-build`)."""
    return bool(bundle.manifest["engine"].get("deferred"))


def open_model(
    bundle: Bundle,
    *,
    instances: int,
    max_images: int,
    engine_cache: Path | None,
    provider: Choice,
    log: Log,
    stop: threading.Event,
) -> Model:
    """Open the bundle's engines, and warm them up and prove them on the stored samples.

    Raises EngineError: an engine does not run here, or differs from torch; ConfigError: `provider`
    is not `auto`, and the bundle is not for ONNX Runtime.
    """
    opened = opener(bundle, engine_cache, provider, log, stop)
    with ExitStack() as undo:
        engines = []
        for index in range(instances):
            engine = undo.enter_context(opened())
            proof = prove(bundle, engine, f"engine {index}")
            engines.append(engine)
        log(
            f"warm: {proof.samples} samples on {runs_on(engine)} in batches of"
            f" {min(proof.batches)} to {max(proof.batches)}, largest difference from torch"
            f" {proof.relative:.2g} of the largest logit"
        )
        undo.pop_all()
    facts = engines[0].describe()
    from PIL import Image

    # The first image would otherwise take the time of importing Pillow.
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    decode_image(content.getvalue(), bundle.preprocessing, Limits().pixels)
    return Model(
        bundle=bundle,
        engines=tuple(engines),
        signature=Signature(
            name=bundle.name,
            version=VERSION,
            input_shape=bundle.input_shape,
            labels=bundle.labels,
            max_images=max_images,
        ),
        platform="tensorrt_plan" if facts["name"] == "trt" else "onnxruntime_onnx",
        max_batch=engines[0].max_batch,
        card=_card(bundle, facts, proof),
    )


def opener(
    bundle: Bundle,
    engine_cache: Path | None,
    provider: Choice,
    log: Log,
    stop: threading.Event,
    file: str = ONNX,
) -> Callable[[], Engine]:
    """Return a function that opens another engine at each call.

    `file` names an ONNX file in the bundle. Raises ConfigError: `provider` is not `auto`, and the
    bundle is not for ONNX Runtime.
    """
    if bundle.manifest["engine"]["name"] == "ort":
        return lambda: open_served(bundle, file, provider, log)
    if provider != "auto":
        raise ConfigError(
            f"--provider {provider}: only applies to ONNX Runtime, and {bundle.root} is for"
            " TensorRT; leave it out"
        )
    if not is_deferred(bundle):
        return lambda: open_engine(bundle)
    assert engine_cache is not None, "read_bundle has checked it"
    cache = PlanCache(engine_cache, say=log, stop=stop)
    return lambda: cache.open(bundle, file)


def runs_on(engine: Engine) -> str:
    """The execution provider or the GPU of an engine, for logs."""
    facts = engine.describe()
    return str(facts.get("provider") or facts.get("device") or facts["name"])


def _card(bundle: Bundle, engine: dict[str, Any], proof: Parity) -> dict[str, Any]:
    """The model card; it names no file of this machine."""
    report = json.loads(bundle.read(REPORT))
    manifest = bundle.manifest
    blocks = report.get("blocks", {})
    kept = ("runtime", "version", "provider", "threads", "max_batch", "device")
    return {
        "name": bundle.name,
        "version": VERSION,
        "digest": manifest["digest"],
        "data": manifest.get("data", {}).get("name"),
        "labels": list(bundle.labels),
        "input_shape": list(bundle.input_shape),
        "preprocessing": bundle.preprocessing.described(),
        "precision": manifest["precision"],
        "engine": {key: engine[key] for key in kept if engine.get(key) is not None},
        "passed": report.get("passed"),
        "lossless": report.get("lossless", True),
        "blocks": {key: blocks.get(key) for key in ("baseline", "compact")},
        "parameters": report.get("parameters", {}),
        "flops": report.get("flops", {}),
        "accuracy": report.get("accuracy", {}),
        "latency": report.get("latency", []),
        "latency_baseline": report.get("latency_baseline"),
        "proof": {"samples": proof.samples, "difference": proof.relative, "limit": proof.limit},
    }
