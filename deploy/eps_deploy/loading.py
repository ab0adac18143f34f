"""From a bundle to the engine that serves it, whichever that is. No torch here."""

from __future__ import annotations

import json

from eps_deploy.bundle import Bundle
from eps_deploy.engines.base import Engine
from eps_train.errors import FileFormatError

ONNX = "model.onnx"


def open_engine(bundle: Bundle, *, threads: int | None = None) -> Engine:
    """The engine that the bundle's manifest names, ready to run; close it after use.

    Where the plan is still to be built, that is ONNX Runtime on the processor.

    Args:
        bundle: as `load_bundle` gives it.
        threads: of ONNX Runtime; None: as many as the manifest says.

    Raises:
        EngineError: the engine does not run on this machine, or the plan was built for another.
        FileFormatError: the model and the labels do not agree.
    """
    if not bundle.model.endswith(".plan"):
        recorded = bundle.manifest["engine"].get("provider", "")
        return open_onnx(bundle, provider=recorded, threads=threads)
    from eps_deploy.engines.trt.run import TrtEngine
    from eps_deploy.engines.trt.sidecar import SIDECAR, Sidecar

    name = str(bundle.root / bundle.model)
    sidecar = Sidecar.from_dict(json.loads(bundle.read(SIDECAR)), name=f"{name}.json")
    return _agreeing(bundle, TrtEngine(bundle.read(bundle.model), sidecar, name=name))


def open_onnx(
    bundle: Bundle,
    *,
    file: str = ONNX,
    provider: str = "",
    threads: int | None = None,
    rounded: bool = False,
) -> Engine:
    """A network in any bundle on ONNX Runtime; raises as :func:`open_engine` does.

    On the processor, and with the arithmetic of the file, unless `provider` is the execution
    provider of the manifest. `rounded`: float16 too is computed as the file says, see
    `exporting.half`, which needs the package onnx.
    """
    from eps_deploy.engines.ort import PROVIDERS, OrtEngine, Provider

    content = bundle.read(file)
    if rounded:
        from eps_deploy.exporting import half

        content = half.rounded(content)
    recorded = bundle.manifest["engine"]
    known: dict[str, Provider] = {full: short for short, full in PROVIDERS.items()}
    engine = OrtEngine(
        content,
        name=str(bundle.root / file),
        provider=known.get(provider, "cpu"),
        threads=threads or int(recorded.get("threads", 1)),
        max_batch=int(recorded["max_batch"]),
        tf32=bool(recorded.get("tf32", False)),
        exact_qdq=not provider,
    )
    return _agreeing(bundle, engine)


def _agreeing(bundle: Bundle, engine: Engine) -> Engine:
    if engine.classes != len(bundle.labels):
        raise FileFormatError(f"{bundle.root}: the model and the labels do not agree")
    return engine
