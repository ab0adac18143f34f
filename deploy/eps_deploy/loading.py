"""From a bundle to the engine that serves it, whichever that is. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Literal

from eps_deploy.bundle import Bundle
from eps_deploy.engines.base import Engine, EngineError
from eps_train.errors import FileFormatError

ONNX = "model.onnx"
Choice = Literal["auto", "cpu", "cuda"]


def open_engine(bundle: Bundle) -> Engine:
    """The engine that the bundle's manifest names, ready to run; close it after use.

    Where the plan is still to be built, that is ONNX Runtime on the processor.

    Raises:
        EngineError: the engine does not run on this machine, or the plan was built for another.
        FileFormatError: the model and the labels do not agree.
    """
    if not bundle.model.endswith(".plan"):
        recorded = bundle.manifest["engine"].get("provider", "")
        return open_onnx(bundle, provider=recorded)
    from eps_deploy.engines.trt.run import TrtEngine
    from eps_deploy.engines.trt.sidecar import SIDECAR, Sidecar

    name = str(bundle.root / bundle.model)
    sidecar = Sidecar.from_dict(json.loads(bundle.read(SIDECAR)), name=f"{name}.json")
    return _agreeing(bundle, TrtEngine(bundle.read(bundle.model), sidecar, name=name))


def open_onnx(
    bundle: Bundle, *, file: str = ONNX, provider: str = "", rounded: bool = False
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
        threads=int(recorded.get("threads", 1)),
        max_batch=int(recorded["max_batch"]),
        tf32=bool(recorded.get("tf32", False)),
        exact_qdq=not provider,
    )
    return _agreeing(bundle, engine)


def open_served(bundle: Bundle, file: str, choice: Choice, say: Callable[[str], None]) -> Engine:
    """A network in a bundle on the ONNX Runtime provider that a server chooses.

    Args:
        bundle: as `load_bundle` gives it.
        file: name of the ONNX file in the bundle.
        choice: `auto`: the GPU where ONNX Runtime really runs the network on it, else the CPU.
        say: told why a GPU is not used although the bundle or the installed package is for one.

    Raises:
        EngineError: ONNX Runtime does not run the network on the provider.
        FileFormatError: the model and the labels do not agree.
    """
    from onnxruntime import get_available_providers

    from eps_deploy.engines.ort import PROVIDERS

    cpu, cuda = PROVIDERS["cpu"], PROVIDERS["cuda"]
    if choice != "auto":
        return open_onnx(bundle, file=file, provider=PROVIDERS[choice])
    recorded = bundle.manifest["engine"].get("provider", cpu)
    for provider in dict.fromkeys((recorded, cuda)):
        if provider == cpu:
            continue
        try:
            return open_onnx(bundle, file=file, provider=provider)
        except EngineError as error:
            if provider == recorded or provider in get_available_providers():
                say(f"not served by {provider}: {error}")
    return open_onnx(bundle, file=file, provider=cpu)


def _agreeing(bundle: Bundle, engine: Engine) -> Engine:
    if engine.classes != len(bundle.labels):
        raise FileFormatError(f"{bundle.root}: the model and the labels do not agree")
    return engine
