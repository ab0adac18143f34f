"""Open the engines of a bundle for serving, warm and proven."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eps_core.checks import Parity
from eps_core.cli import Log
from eps_core.errors import ConfigError, FileFormatError
from eps_deploy.bundle import ONNX, Bundle, Choice, load_bundle, open_engine, open_served, prove
from eps_deploy.engines.base import Engine
from eps_deploy.engines.trt.build import BuildOptions
from eps_deploy.engines.trt.cache import PlanCache
from eps_deploy.engines.trt.engine import TrtEngine
from eps_deploy.precision import PRECISIONS
from eps_deploy.serving.limits import Limits
from eps_deploy.serving.protocol import Signature, decode_image

REPORT = "report.json"
VERSION = "1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A loaded bundle.

    Attributes:
        bundle: verified.
        engines: one for each instance; TensorRT's instances share one, which occurs as often.
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
    instances: int | None,
    max_images: int,
    engine_cache: Path | None,
    provider: Choice,
    log: Log,
    stop: threading.Event,
) -> Model:
    """Open the bundle's engines, and warm them up and prove them on the stored samples.

    `instances` is None for the default: two inferences in flight on TensorRT, so that the images of
    one are copied while the other computes, and one on ONNX Runtime.

    Raises EngineError: an engine does not run here, or differs from torch; ConfigError: `provider`
    is not `auto`, and the bundle is not for ONNX Runtime.
    """
    # TensorRT's instances are execution contexts of one engine, ONNX Runtime's are sessions.
    is_plan = bundle.manifest["engine"]["name"] == "trt"
    if instances is None:
        instances = 2 if is_plan else 1
    opened = opener(bundle, engine_cache, provider, log, stop, contexts=instances)
    with ExitStack() as undo:
        engines = []
        for index in range(1 if is_plan else instances):
            engine = undo.enter_context(opened())
            proof = prove(bundle, engine, f"engine {index}")
            if isinstance(engine, TrtEngine):
                engine.warm_up()  # all execution contexts, of which the proof ran on one
            engines.append(engine)
        log(
            f"warm: {proof.samples} samples on {runs_on(engine)} in batches of"
            f" {min(proof.batches)} to {max(proof.batches)}, largest difference from torch"
            f" {proof.relative:.2g} of the largest logit"
        )
        undo.pop_all()
    engines *= instances // len(engines)
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
    contexts: int = 1,
) -> Callable[[], Engine]:
    """Return a function that opens another engine at each call.

    `file` names an ONNX file in the bundle, `contexts` is the number of execution contexts of a
    TensorRT engine. Raises ConfigError: `provider` is not `auto`, and the bundle is not for ONNX
    Runtime.
    """
    if bundle.manifest["engine"]["name"] == "ort":
        return lambda: open_served(bundle, file, provider, log)
    if provider != "auto":
        raise ConfigError(
            f"--provider {provider}: only applies to ONNX Runtime, and {bundle.root} is for"
            " TensorRT; leave it out"
        )
    if not is_deferred(bundle):
        return lambda: open_engine(bundle, contexts=contexts)
    assert engine_cache is not None, "read_bundle has checked it"
    cache = PlanCache(engine_cache, log=log, stop=stop)

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
