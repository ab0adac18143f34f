"""Proving a bundle again, on any machine, from its files alone. No torch here.

That every file is the one that its manifest names is seen by `load_bundle` already; what follows
is whether the engine still answers, on this machine, what the network answered in torch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eps_compact.checks import Check, Verification
from eps_deploy.bundle import Bundle, load_bundle
from eps_deploy.engines.base import Engine, EngineError
from eps_deploy.loading import open_engine, open_onnx
from eps_deploy.measuring import parity
from eps_deploy.measuring.limits import PARITY_LIMITS
from eps_deploy.precision import PRECISIONS
from eps_train import console

SAMPLES = "samples.npz"
REPORT = "report.json"


def verify_bundle(path: Path, *, report: Callable[[str], None]) -> Verification:
    """Check the bundle at `path`; `report` is told what is being done, a line at a time.

    Raises FileFormatError when a file is damaged, missing or foreign: then there is no bundle to
    be proven.
    """
    bundle = load_bundle(path)
    told = json.loads(bundle.read(REPORT))
    found = Verification(lossless=bool(told.get("lossless", True)))
    add = found.checks.append
    add(Check("files", True, f"SHA-256 of {len(bundle.manifest['files'])} files match"))
    add(_report(bundle, told))
    report("running the engine on the stored samples")
    precision = PRECISIONS[bundle.manifest["precision"]]
    half = precision.float == "float16"
    add(_parity(bundle, "onnx", lambda: open_onnx(bundle, rounded=half)))
    if bundle.model.endswith(".plan"):
        add(_parity(bundle, "plan", lambda: open_engine(bundle)))
    elif bundle.manifest["engine"].get("deferred"):
        add(Check("plan", None, "still to be built, by the machine that serves the bundle"))
    elif half or precision.quantized or _provider(bundle) != "CPUExecutionProvider":
        # What is served is not computed as the file says.
        add(_parity(bundle, "engine", lambda: open_engine(bundle)))
    return found


def _provider(bundle: Bundle) -> str:
    return str(bundle.manifest["engine"].get("provider", ""))


def _report(bundle: Bundle, told: dict[str, Any]) -> Check:
    """Whether the report is on this bundle's engine, and what its verdict was."""
    ours = (bundle.manifest["precision"], bundle.manifest["engine"]["name"])
    theirs = (told.get("precision", {}).get("name"), told.get("engine"))
    if ours != theirs:
        return Check("report", False, f"is on {theirs}, the manifest on {ours}")
    words = {True: "passed", False: "FAILED: a goal was missed", None: "open"}
    verdict = told.get("passed")
    return Check("report", verdict is not False, f"verdict then: {words[verdict]}")


def _parity(bundle: Bundle, name: str, open_it: Callable[[], Engine]) -> Check:
    """The stored samples' logits against those that torch gave when the bundle was made."""
    with np.load(io.BytesIO(bundle.read(SAMPLES)), allow_pickle=False) as samples:
        images, logits, indices = samples["images"], samples["logits"], samples["indices"]
    limit = PARITY_LIMITS[bundle.manifest["precision"]]
    try:
        with open_it() as engine:
            batches = sorted({min(size, engine.max_batch) for size in (1, 2, engine.max_batch)})
            answers = parity.passes(engine.infer, images, batches)
    except EngineError as error:
        return Check(name, None, str(error))
    except ModuleNotFoundError as error:
        return Check(name, None, console.missing_package(error))
    expected = [logits] * len(batches)
    told = parity.compare(name, expected, answers, indices.tolist(), limit, batches)
    if told.relative is None:
        return Check(name, False, "some logits are not finite")
    return Check(
        name,
        told.passed,
        f"{len(images)} samples: largest difference {told.relative:.2g} of the largest logit,"
        f" limit {limit:g}; same class on {100 * told.top1_agreement:.2f} %",
    )
