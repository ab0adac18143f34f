"""Open the engines of a bundle for serving, warm and proven: the served ones and a shadow's."""

from __future__ import annotations

import io
import json
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from eps_core.checks import Parity
from eps_core.cli import Log
from eps_core.errors import ConfigError, FileFormatError
from eps_deploy.bundle import (
    ONNX,
    REPORT,
    Bundle,
    Choice,
    load_bundle,
    open_engine,
    open_served,
    prove,
    replay,
)
from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Engine
from eps_deploy.engines.trt.build import BuildOptions
from eps_deploy.engines.trt.cache import PlanCache
from eps_deploy.engines.trt.engine import TrtEngine
from eps_deploy.precision import PRECISIONS
from eps_deploy.serving.batching import Batching
from eps_deploy.serving.limits import Limits
from eps_deploy.serving.protocol import DATATYPE, Signature, decode_image

BASELINE = "baseline.onnx"
VERSION = "1"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Options of loading and running the bundle at `path`.

    The shadow is a bundle's folder, or "baseline" for the baseline in the bundle at `path`; it runs
    the fraction `shadow_share` of the batches.
    """

    path: Path
    engine_cache: Path | None = None
    provider: Choice = "auto"
    batching: Batching = field(default_factory=Batching)
    shadow: str | None = None
    shadow_share: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A loaded and verified bundle.

    Attributes:
        engines: one for each instance; TensorRT's instances share one, which occurs as often.
        card: the model card, plain data for the page: facts of the network and of its report.
    """

    bundle: Bundle
    engines: tuple[Engine, ...]
    signature: Signature
    card: dict[str, Any]

    def close(self) -> None:
        with ExitStack() as stack:
            for engine in self.engines:
                stack.push(engine.__exit__)

    @property
    def max_batch(self) -> int:
        return self.engines[0].max_batch

    @property
    def platform(self) -> str:
        """Triton's name of the runtime."""
        on_trt = self.engines[0].describe()["name"] == "trt"
        return "tensorrt_plan" if on_trt else "onnxruntime_onnx"

    def metadata(self) -> dict[str, Any]:
        """The model's metadata in the words of KServe v2."""
        model = self.signature
        shape, classes = [-1, *model.input_shape], [-1, len(model.labels)]
        return {
            "name": model.name,
            "versions": [model.version],
            "platform": self.platform,
            "inputs": [{"name": INPUT_NAME, "datatype": DATATYPE, "shape": shape}],
            "outputs": [{"name": OUTPUT_NAME, "datatype": "FP32", "shape": classes}],
        }

    def config(self) -> dict[str, Any]:
        """The model configuration as Triton has it: sizes are without the batch."""
        model = self.signature
        shape, classes = list(model.input_shape), [len(model.labels)]
        provider = self.engines[0].describe().get("provider")
        kind = "KIND_CPU" if provider == "CPUExecutionProvider" else "KIND_GPU"
        parameters = {"preprocessing": json.dumps(self.bundle.preprocessing.described())}
        if provider is not None:
            parameters["execution_provider"] = str(provider)
        return {
            "name": model.name,
            "platform": self.platform,
            "max_batch_size": self.max_batch,
            "input": [{"name": INPUT_NAME, "data_type": f"TYPE_{DATATYPE}", "dims": shape}],
            "output": [{"name": OUTPUT_NAME, "data_type": "TYPE_FP32", "dims": classes}],
            "instance_group": [{"count": len(self.engines), "kind": kind}],
            "parameters": {key: {"string_value": value} for key, value in parameters.items()},
        }


def read_bundle(path: Path, engine_cache: Path | None) -> Bundle:
    """Read and verify a bundle. Raises FileFormatError; ConfigError: it needs an engine cache."""
    bundle = load_bundle(path)
    if bundle.manifest["engine"].get("deferred") and engine_cache is None:
        raise ConfigError(
            f"{path}: its plan is still to be built, on this machine; name a folder for it with"
            " --engine-cache DIR"
        )
    return bundle


def open_model(bundle: Bundle, source: ModelSource, *, log: Log, stop: threading.Event) -> Model:
    """Open the bundle's engines, and warm them up and prove them on the stored samples.

    By default, two inferences are in flight on TensorRT, so that the images of one are copied while
    the other computes, and one on ONNX Runtime. `stop` cancels a plan that is being built.

    Raises EngineError: an engine does not run here, or differs from torch; ConfigError: the
    provider is not `auto`, and the bundle is not for ONNX Runtime.
    """
    # TensorRT's instances are execution contexts of one engine, ONNX Runtime's are sessions.
    is_plan = bundle.manifest["engine"]["name"] == "trt"
    instances = source.batching.instances or (2 if is_plan else 1)
    with ExitStack() as undo:
        engines = []
        for index in range(1 if is_plan else instances):
            engine = open_instance(bundle, source, log=log, stop=stop, contexts=instances)
            undo.enter_context(engine)
            proof = prove(bundle, engine, f"engine {index}")
            if isinstance(engine, TrtEngine):
                engine.warm_up()  # all execution contexts, of which the proof ran on one
            engines.append(engine)
        facts = engine.describe()
        log(
            f"warm: {proof.samples} samples on"
            f" {facts.get('provider') or facts.get('device') or facts['name']} in batches of"
            f" {min(proof.batches)} to {max(proof.batches)}, largest difference from torch"
            f" {proof.relative:.2g} of the largest logit"
        )
        undo.pop_all()
    engines *= instances // len(engines)
    from PIL import Image

    # The first image would otherwise take the time of importing Pillow.
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    decode_image(content.getvalue(), bundle.preprocessing, Limits().pixels)
    signature = Signature(
        name=bundle.name,
        version=VERSION,
        input_shape=bundle.input_shape,
        labels=bundle.labels,
        max_images=source.batching.max_queue,
    )
    card = _card(bundle, facts, proof)
    return Model(bundle=bundle, engines=tuple(engines), signature=signature, card=card)


def open_instance(
    bundle: Bundle,
    source: ModelSource,
    *,
    log: Log,
    stop: threading.Event,
    file: str = ONNX,
    contexts: int = 1,
) -> Engine:
    """Open one engine; for a deferred plan, build it unless it is in the cache.

    `file` names an ONNX file in the bundle, `contexts` is the number of execution contexts of a
    TensorRT engine. Raises ConfigError: the provider is not `auto`, and the bundle is not for ONNX
    Runtime.
    """
    if bundle.manifest["engine"]["name"] == "ort":
        return open_served(bundle, file, source.provider, log)
    if source.provider != "auto":
        raise ConfigError(
            f"--provider {source.provider}: only applies to ONNX Runtime, and {bundle.root} is for"
            " TensorRT; leave it out"
        )
    if not bundle.manifest["engine"].get("deferred"):
        return open_engine(bundle, contexts=contexts)
    assert source.engine_cache is not None, "read_bundle has checked it"
    cache = PlanCache(source.engine_cache, log=log, stop=stop)
    plan = cache.plan(
        bundle.read(file),
        PRECISIONS[bundle.manifest["precision"]],
        build_options(bundle),
        kept=json.loads(bundle.read(REPORT)).get("precision", {}).get("kept", ()),
    )
    return cache.open(plan, contexts=contexts)


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


# -- The shadow's engine: of another bundle, or of the baseline in the served one


def read_shadow(served: Bundle, shadow: str, engine_cache: Path | None) -> Bundle:
    """Read and verify the shadow's bundle.

    Raises FileFormatError; ConfigError: its input shape or labels differ from those of `served`, or
    the baseline would not run on the same runtime.
    """
    if shadow == "baseline":
        if served.model.endswith(".plan"):
            raise ConfigError(
                f"--shadow baseline: {served.root} has a TensorRT plan, but none of the baseline;"
                " deploy it with --defer-build, and this server builds both"
            )
        if BASELINE not in served.manifest["files"]:
            raise ConfigError(
                f"--shadow baseline: {served.root} has no {BASELINE}; name another bundle"
            )
        return served
    bundle = read_bundle(Path(shadow), engine_cache)
    for what, theirs, ours in (
        ("images of shape", list(bundle.input_shape), list(served.input_shape)),
        ("labels", bundle.labels, served.labels),
    ):
        if theirs != ours:
            raise ConfigError(
                f"--shadow {bundle.root}: {what} {_short(theirs)}, and {served.root} has"
                f" {_short(ours)}; name a bundle for the same data"
            )
    return bundle


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, list) else ", ".join(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def open_shadow(
    model: Model, source: ModelSource, shadow: str, *, log: Log, stop: threading.Event
) -> Engine:
    """Open and warm up the shadow's engine; an engine of another bundle is proven too.

    Raises the errors of :func:`read_shadow`; EngineError: it does not run here; ConfigError: the
    batches of `model` are too large for it.
    """
    bundle = read_shadow(model.bundle, shadow, source.engine_cache)
    own_bundle = bundle is not model.bundle
    file = ONNX if own_bundle else BASELINE
    with ExitStack() as undo:
        engine = open_instance(bundle, source, log=log, stop=stop, file=file)
        undo.enter_context(engine)
        if engine.max_batch < model.max_batch:
            raise ConfigError(
                f"--shadow {bundle.root}: takes batches of up to {engine.max_batch}, and"
                f" {model.bundle.root} of up to {model.max_batch}; deploy it with --max-batch"
                f" {model.max_batch}"
            )
        if own_bundle:
            prove(bundle, engine, "shadow")
        else:
            replay(bundle, engine, "shadow")  # only warm-up: no logits of the baseline are stored
        undo.pop_all()
    name = f"the bundle {bundle.manifest['digest'][:12]}" if own_bundle else BASELINE
    log(f"shadow: {name} runs {source.shadow_share:g} of the batches")
    return engine
