"""Bundle: a folder with everything that serves a network, and a manifest with checksums.

`manifest.json` holds the SHA-256 of every other file, and its own: `digest` is the SHA-256 of the
manifest's bytes with the digest's 64 digits replaced by zeros. :func:`load_bundle` verifies all of
them. This module does not import torch: servers have none.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec
import numpy as np

from eps_core import cli
from eps_core.checks import Check, Parity, Verification, compare_logits
from eps_core.cli import Log
from eps_core.errors import ConfigError, FileFormatError
from eps_core.preprocessing import Preprocessing
from eps_deploy.bench.accuracy import PARITY_LIMITS, passes
from eps_deploy.engines.base import Engine, EngineError, padded_sizes
from eps_deploy.precision import PRECISIONS

FORMAT = "eps-resnet-bundle"
SCHEMA = 1
MANIFEST = "manifest.json"
NAME = "eps_resnet"  # default name of a model
NO_DIGEST = "0" * 64
_RESTORE = "restore it from a good copy or run eps-deploy again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A verified bundle in the folder `root`.

    Attributes:
        name: of the model, as clients use it.
        manifest: `manifest.json` as plain data.
        preprocessing: from an image to the network's input.
        labels: names of the classes, by index.
        input_shape: shape `[C, H, W]` of one image.
        model: name of the file that the engine loads.
    """

    root: Path
    name: str
    manifest: Mapping[str, Any]
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    input_shape: tuple[int, int, int]
    model: str

    def read(self, name: str) -> bytes:
        """Read and verify one of the bundle's files. Raises FileFormatError."""
        listed = self.manifest["files"].get(name)
        if listed is None:
            raise FileFormatError(f"{self.root}: the bundle has no file {name}")
        return _verified(self.root, name, listed)


def load_bundle(path: Path | str) -> Bundle:
    """Read a bundle and verify every file that its manifest lists.

    Raises FileFormatError, in one line that names the file, when anything is missing, truncated,
    changed, foreign, or written by a newer eps-resnet.
    """
    root = Path(path)
    manifest = _read_manifest(root)
    try:
        channels, height, width = manifest["input"]["shape"][1:]
        bundle = Bundle(
            root=root,
            name=check_name(manifest.get("name", NAME)),
            manifest=manifest,
            preprocessing=Preprocessing.from_dict(manifest["preprocessing"]),
            labels=tuple(str(label) for label in manifest["labels"]),
            input_shape=(int(channels), int(height), int(width)),
            model=str(manifest["engine"]["file"]),
        )
        files = dict(manifest["files"])
        classes = int(manifest["output"]["shape"][1])
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise FileFormatError(f"{root / MANIFEST}: not a usable manifest ({error!r})") from error
    if bundle.model not in files:
        raise FileFormatError(f"{root / MANIFEST}: it does not list its own model {bundle.model}")
    if bundle.preprocessing.shape != bundle.input_shape or len(bundle.labels) != classes:
        raise FileFormatError(f"{root / MANIFEST}: preprocessing, labels and model do not agree")
    for name, listed in files.items():
        _verified(root, name, listed)
    return bundle


def check_name(name: Any) -> str:
    """Check and return a model's name, which is part of URLs and a folder's name.

    Raises ConfigError. `stats` is not allowed: `v2/models/stats` is a path of the protocol.
    """
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name)):
        raise ConfigError(
            f"model name {name!r}: use up to 63 letters, digits, '_', '-' and '.', a letter or"
            " digit first"
        )
    if name == "stats":
        raise ConfigError("model name 'stats': the protocol has a path of this name; use another")
    return name


def is_bundle(folder: Path) -> bool:
    """Whether `folder` holds a bundle's manifest, of any version, damaged or not."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def encode_manifest(fields: Mapping[str, Any]) -> bytes:
    """Encode a manifest, with its own digest."""
    blank_fields = {"format": FORMAT, "schema": SCHEMA, "digest": NO_DIGEST, **fields}
    text = json.dumps(blank_fields, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    blank = text.encode()
    digest = hashlib.sha256(blank).hexdigest()
    return blank.replace(NO_DIGEST.encode(), digest.encode(), 1)


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not root.is_dir():
        problem = "is a file, not a bundle's folder" if root.exists() else "no such folder"
        raise FileFormatError(f"{root}: {problem}; name the folder that eps-deploy wrote")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileFormatError(f"{root}: not a bundle of eps-deploy (no {MANIFEST} in it)") from None
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror}; {_RESTORE}") from None
    try:
        manifest = msgspec.json.decode(content)
    except (ValueError, RecursionError):
        raise FileFormatError(f"{path}: damaged or not JSON; {_RESTORE}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FileFormatError(f"{path}: not a manifest of eps-deploy")
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise FileFormatError(
            f"{path}: schema {schema} is newer than this eps-resnet reads (up to {SCHEMA});"
            " upgrade eps-resnet"
        )
    digest = str(manifest.get("digest")).encode()
    blank = content.replace(digest, NO_DIGEST.encode(), 1)
    if schema != SCHEMA or hashlib.sha256(blank).hexdigest().encode() != digest:
        raise FileFormatError(f"{path}: damaged or edited (its digest does not match); {_RESTORE}")
    return manifest


def _verified(root: Path, name: str, listed: Any) -> bytes:
    """Read a listed file and verify its size and SHA-256.

    A manifest can be forged, so its names must stay in the bundle. Links may lead anywhere, such as
    into the store of a Hugging Face cache or of DVC: the SHA-256 proves what is read through them.
    """
    pure = PurePosixPath(name)
    path = root / pure
    if pure.is_absolute() or ".." in pure.parts or any(char in name for char in "\\:\0"):
        raise FileFormatError(f"{root / MANIFEST}: lists {name}, which is outside the bundle")
    wanted = listed if isinstance(listed, dict) else {}
    try:
        # Before a byte is read: a link may lead to an endless device.
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise FileFormatError(f"{path}: not a file; {_RESTORE}")
        if found.st_size != wanted.get("bytes"):
            raise FileFormatError(
                f"{path}: {found.st_size} bytes where the manifest says {wanted.get('bytes')};"
                f" {_RESTORE}"
            )
        content = path.read_bytes()
    except FileNotFoundError:
        where = f" (its link leads to {os.readlink(path)})" if path.is_symlink() else ""
        raise FileFormatError(f"{path}: missing from the bundle{where}; {_RESTORE}") from None
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != wanted.get("sha256"):
        raise FileFormatError(f"{path}: changed: its SHA-256 is not the manifest's; {_RESTORE}")
    return content


# -- The bundle's engine

ONNX = "model.onnx"
Choice = Literal["auto", "cpu", "cuda"]


def open_engine(bundle: Bundle, *, contexts: int = 1) -> Engine:
    """Open the engine that the bundle's manifest names; close it after use.

    Where the plan is still to be built, that is ONNX Runtime on the CPU. `contexts` is as for
    `TrtEngine`.

    Raises:
        EngineError: the engine does not run on this machine, or the plan was built for another.
        FileFormatError: the model and the labels do not agree.
    """
    if not bundle.model.endswith(".plan"):
        recorded = bundle.manifest["engine"].get("provider", "")
        return open_onnx(bundle, provider=recorded)
    from eps_deploy.engines.trt.engine import TrtEngine
    from eps_deploy.engines.trt.plan import METADATA, PlanMetadata

    name = str(bundle.root / bundle.model)
    metadata = PlanMetadata.from_json(bundle.read(METADATA), name=f"{name}.json")
    engine = TrtEngine(bundle.read(bundle.model), metadata, name=name, contexts=contexts)
    return _agreeing(bundle, engine)


def open_onnx(
    bundle: Bundle, *, file: str = ONNX, provider: str = "", rounded: bool = False
) -> Engine:
    """Open a network of any bundle on ONNX Runtime; raises the errors of :func:`open_engine`.

    Args:
        file: name of the ONNX file in the bundle.
        provider: execution provider, as the manifest has it; "": the CPU, with the exact arithmetic
            of the file.
        rounded: compute float16 exactly as the file says too, see `export.types`; it needs the
            package onnx.
    """
    from eps_deploy.engines.ort import PROVIDERS, OrtEngine, Provider

    content = bundle.read(file)
    if rounded:
        from eps_deploy.export.types import round_to_float16

        content = round_to_float16(content)
    recorded = bundle.manifest["engine"]
    known: dict[str, Provider] = {full: short for short, full in PROVIDERS.items()}
    engine = OrtEngine(
        content,
        name=str(bundle.root / file),
        provider=known.get(provider, "cpu"),
        threads=int(recorded.get("threads", 1)),
        max_batch=int(recorded["max_batch"]),
        precision=PRECISIONS[bundle.manifest["precision"]],
        exact_qdq=not provider,
    )
    return _agreeing(bundle, engine)


def open_served(bundle: Bundle, file: str, choice: Choice, log: Log) -> Engine:
    """Open a network of a bundle on the ONNX Runtime provider that a server is configured for.

    Args:
        file: name of the ONNX file in the bundle.
        choice: `auto`: the GPU where ONNX Runtime really runs the network on it, else the CPU.
        log: called with the reason when a GPU is not used although the bundle or the installed
            package is for one.

    Raises the errors of :func:`open_engine`.
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
                log(f"not served by {provider}: {error}")
    return open_onnx(bundle, file=file, provider=cpu)


def _agreeing(bundle: Bundle, engine: Engine) -> Engine:
    if engine.classes != len(bundle.labels):
        raise FileFormatError(f"{bundle.root}: the model and the labels do not agree")
    return engine


# -- Replay of the stored samples: warm-up and proof in one

SAMPLES = "samples.npz"


def replay(bundle: Bundle, engine: Engine, stage: str) -> Parity:
    """Run the stored samples through an engine and compare its logits with those of torch.

    On a GPU with every batch size that runs there, because TensorRT and cuDNN prepare each one at
    its first use, and with a padded one; on the CPU with 1, 2 and the largest. The samples are
    repeated where they do not fill the largest batch. Afterwards the engine is warm.
    """
    with np.load(io.BytesIO(bundle.read(SAMPLES)), allow_pickle=False) as stored:
        order = np.arange(max(len(stored["images"]), engine.max_batch)) % len(stored["images"])
        images, logits, indices = (stored[key][order] for key in ("images", "logits", "indices"))
    largest = engine.max_batch
    provider = engine.describe().get("provider")
    if provider == "CPUExecutionProvider":
        batches = sorted({1, min(2, largest), largest})
    elif provider == "TensorrtExecutionProvider":  # which pads nothing
        batches = list(range(1, largest + 1))
    else:
        batches = sorted({*padded_sizes(largest), max(1, largest - 1)})
    return compare_logits(
        stage,
        [logits] * len(batches),
        passes(engine.infer, images, batches),
        batches=batches,
        limit=PARITY_LIMITS[bundle.manifest["precision"]],
        indices=indices.tolist(),
    )


def prove(bundle: Bundle, engine: Engine, stage: str) -> Parity:
    """Replay the stored samples. Raises EngineError: the engine fails or differs from torch."""
    parity = replay(bundle, engine, stage)
    if parity.relative is None:
        raise EngineError("on the stored samples some of the engine's logits are not finite")
    if parity.passed is False:
        raise EngineError(
            f"on the stored samples the engine differs from torch by {parity.relative:.2g} of the"
            f" largest logit, and {parity.limit:g} is the limit for"
            f" {bundle.manifest['precision']}; deploy the network again on this machine"
        )
    return parity


# -- Verification of a bundle, on any machine, from its files alone
#
# `load_bundle` has verified the files; what is left is whether the engine still answers, on this
# machine, what the network answered in torch.

REPORT = "report.json"


def verify_bundle(path: Path, *, report: Log) -> Verification:
    """Verify the bundle at `path`; `report` is called with a line for each step.

    Raises FileFormatError when a file is damaged, missing or foreign: then there is no bundle.
    """
    bundle = load_bundle(path)
    verdict = json.loads(bundle.read(REPORT))
    found = Verification(lossless=bool(verdict.get("lossless", True)))
    add = found.checks.append
    add(Check("files", True, f"SHA-256 of {len(bundle.manifest['files'])} files match"))
    add(_check_report(bundle, verdict))
    report("running the engine on the stored samples")
    precision = PRECISIONS[bundle.manifest["precision"]]
    engine = bundle.manifest["engine"]
    half = precision.float == "float16"
    add(_check_engine(bundle, "onnx", lambda: open_onnx(bundle, rounded=half)))
    if bundle.model.endswith(".plan"):
        add(_check_engine(bundle, "plan", lambda: open_engine(bundle)))
    elif engine.get("deferred"):
        add(Check("plan", None, "still to be built, by the machine that serves the bundle"))
    elif half or precision.quantized or engine.get("provider", "") != "CPUExecutionProvider":
        # The served engine does not compute exactly as the file says.
        add(_check_engine(bundle, "engine", lambda: open_engine(bundle)))
    return found


def _check_report(bundle: Bundle, report: dict[str, Any]) -> Check:
    """Whether the report is about this bundle's engine, and what its verdict is."""
    ours = (bundle.manifest["precision"], bundle.manifest["engine"]["name"])
    theirs = (report.get("precision", {}).get("name"), report.get("engine"))
    if ours != theirs:
        return Check("report", False, f"is on {theirs}, the manifest on {ours}")
    passed = report.get("passed")
    word = {True: "passed", False: "FAILED: a goal was missed", None: "open"}[passed]
    return Check("report", passed is not False, f"verdict then: {word}")


def _check_engine(bundle: Bundle, name: str, open_it: Callable[[], Engine]) -> Check:
    try:
        with open_it() as engine:
            parity = replay(bundle, engine, name)
    except EngineError as error:
        return Check(name, None, str(error))
    except ModuleNotFoundError as error:
        return Check(name, None, cli.missing_package(error))
    if parity.relative is None:
        return Check(name, False, "some logits are not finite")
    return Check(
        name,
        parity.passed,
        f"{parity.samples} samples: largest difference {parity.relative:.2g} of the largest logit,"
        f" limit {parity.limit:g}; same class on {100 * parity.top1_agreement:.2f} %",
    )
