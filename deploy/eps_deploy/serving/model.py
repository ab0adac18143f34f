"""A bundle that is loaded, warm and proven, ready to be asked."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eps_core.errors import ConfigError, FileFormatError
from eps_deploy.bench.accuracy import Parity
from eps_deploy.bundle import ONNX, Bundle, Choice, load_bundle, open_engine, open_served, prove
from eps_deploy.engines.base import Engine
from eps_deploy.engines.trt.build import BuildOptions
from eps_deploy.engines.trt.cache import PlanCache
from eps_deploy.precision import PRECISIONS
from eps_deploy.serving.limits import Limits
from eps_deploy.serving.protocol import Signature, decode

Say = Callable[[str], None]
REPORT = "report.json"
VERSION = "1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What one load has made.

    Attributes:
        bundle: verified.
        engines: one for each instance; TensorRT's instances share one.
        signature: for the protocol.
        platform: in Triton's words, `onnxruntime_onnx` or `tensorrt_plan`.
        max_batch: the engine's largest batch.
        card: plain data for the page: what the network is, and what its report says.
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
    say: Say,
    stop: threading.Event,
) -> Model:
    """Open the bundle's engines, warm them up on the stored samples and prove them. Takes its time.

    Raises EngineError: an engine does not run here, or does not answer what torch answered;
    ConfigError: `provider` is named, and the bundle is not for ONNX Runtime.
    """
    opened = opener(bundle, engine_cache, provider, say, stop, contexts=instances)
    # TensorRT's instances are execution contexts of one engine, ONNX Runtime's are sessions.
    is_plan = bundle.manifest["engine"]["name"] == "trt"
    with ExitStack() as undo:
        engines = []
        for index in range(1 if is_plan else instances):
            engine = undo.enter_context(opened())
            proof = prove(bundle, engine, f"engine {index}")
            engines.append(engine)
        say(
            f"warm: {proof.samples} samples on {runs_on(engine)} in batches of"
            f" {min(proof.batches)} to {max(proof.batches)}, largest difference from torch"
            f" {proof.relative:.2g} of the largest logit"
        )
        undo.pop_all()
    engines *= instances // len(engines)
    told = engines[0].describe()
    _warm_pillow(bundle)
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
        platform="tensorrt_plan" if told["name"] == "trt" else "onnxruntime_onnx",
        max_batch=engines[0].max_batch,
        card=_card(bundle, told, proof),
    )


def _warm_pillow(bundle: Bundle) -> None:
    """Its first picture costs the time of importing it."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    decode(file.getvalue(), bundle.preprocessing, Limits().pixels)


def opener(
    bundle: Bundle,
    engine_cache: Path | None,
    provider: Choice,
    say: Say,
    stop: threading.Event,
    file: str = ONNX,
    contexts: int = 1,
) -> Callable[[], Engine]:
    """Opens another engine at each call.

    `file` names another network than the bundle's model, `contexts` is the number of execution
    contexts of a TensorRT engine.

    Raises ConfigError: `provider` is named, and the bundle is not for ONNX Runtime.
    """
    if bundle.manifest["engine"]["name"] == "ort":
        return lambda: open_served(bundle, file, provider, say)
    if provider != "auto":
        raise ConfigError(
            f"--provider {provider}: only applies to ONNX Runtime, and {bundle.root} is for"
            " TensorRT; leave it out"
        )
    if not is_deferred(bundle):
        return lambda: open_engine(bundle, contexts=contexts)
    assert engine_cache is not None, "read_bundle has seen to it"
    cache = PlanCache(engine_cache, log=say, stop=stop)

    def build_and_open() -> Engine:
        plan = cache.plan(
            bundle.read(file),
            PRECISIONS[bundle.manifest["precision"]],
            build_options(bundle),
            kept=json.loads(bundle.read(REPORT)).get("precision", {}).get("kept", ()),
        )
        return cache.open(plan, contexts=contexts)

    return build_and_open


def build_options(bundle: Bundle) -> BuildOptions:
    """How to build a deferred plan. Raises FileFormatError when the manifest does not say so."""
    recorded = bundle.manifest["engine"]
    names = [field.name for field in fields(BuildOptions) if field.name != "timing_cache"]
    try:
        return BuildOptions(**{name: recorded[name] for name in names})
    except (KeyError, TypeError, ConfigError) as error:
        raise FileFormatError(
            f"{bundle.root}: the manifest does not say how to build the plan ({error!r});"
            " run eps-deploy again"
        ) from error


def runs_on(engine: Engine) -> str:
    """The execution provider or the GPU of an engine, for logs."""
    told = engine.describe()
    return str(told.get("provider") or told.get("device") or told["name"])


def _card(bundle: Bundle, told: dict[str, Any], proof: Parity) -> dict[str, Any]:
    """Nothing that names a file of this machine."""
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
        "engine": {key: told[key] for key in kept if told.get(key) is not None},
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
