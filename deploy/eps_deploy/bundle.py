"""The bundle: a folder with everything that serves a network, and a manifest that vouches for it.

`manifest.json` holds the SHA-256 of every other file, and its own: `digest` is the SHA-256 of the
manifest's bytes with the digest's 64 digits replaced by zeros. :func:`load_bundle` checks all of
it. No torch here: servers have none.
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
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from eps_core import cli
from eps_core.checks import Check, Verification
from eps_core.errors import ConfigError, FileFormatError
from eps_core.preprocessing import Preprocessing
from eps_deploy.bench import accuracy
from eps_deploy.bench.accuracy import PARITY_LIMITS, Parity
from eps_deploy.engines.base import Engine, EngineError, Images, Logits
from eps_deploy.precision import PRECISIONS

FORMAT = "eps-resnet-bundle"
SCHEMA = 1
MANIFEST = "manifest.json"
NAME = "eps_resnet"  # of a model that was given none
NO_DIGEST = "0" * 64
_AGAIN = "restore it from a good copy or run eps-deploy again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A verified bundle.

    Attributes:
        root: its folder.
        name: of the model; clients ask for it.
        manifest: `manifest.json` as plain data.
        preprocessing: from a picture to the network's input.
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
        """The bytes of one of the bundle's files, verified again. Raises FileFormatError."""
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
    """A model's name that paths, folders, Triton and KServe take. Raises ConfigError for another.

    It is one part of a URL and one folder, as both write it without escapes; `v2/models/stats` has
    a meaning of its own.
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
    """Whether `folder` holds a manifest of ours, of any version and however damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def encode_manifest(fields: Mapping[str, Any]) -> bytes:
    """The manifest's bytes, sealed with their own digest."""
    unsealed = {"format": FORMAT, "schema": SCHEMA, "digest": NO_DIGEST, **fields}
    text = json.dumps(unsealed, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
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
        raise FileFormatError(f"{path}: cannot be read: {error.strerror}; {_AGAIN}") from None
    try:
        manifest = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise FileFormatError(f"{path}: damaged or not JSON; {_AGAIN}") from None
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
        raise FileFormatError(f"{path}: damaged or edited (its digest does not match); {_AGAIN}")
    return manifest


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _verified(root: Path, name: str, listed: Any) -> bytes:
    """The content of a listed file.

    A manifest can be forged, so its names must stay in the bundle. Links may lead anywhere, as into
    the store of a Hugging Face cache or of DVC: the SHA-256 proves what is read through them.
    """
    pure = PurePosixPath(name)
    path = root / pure
    if pure.is_absolute() or ".." in pure.parts or any(sign in name for sign in "\\:\0"):
        raise FileFormatError(f"{root / MANIFEST}: lists {name}, which lies outside the bundle")
    wanted = listed if isinstance(listed, dict) else {}
    try:
        # Before a byte is read: a link may lead to a device without end.
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise FileFormatError(f"{path}: not a file; {_AGAIN}")
        if found.st_size != wanted.get("bytes"):
            raise FileFormatError(
                f"{path}: {found.st_size} bytes where the manifest says {wanted.get('bytes')};"
                f" {_AGAIN}"
            )
        content = path.read_bytes()
    except FileNotFoundError:
        where = f" (its link leads to {os.readlink(path)})" if path.is_symlink() else ""
        raise FileFormatError(f"{path}: missing from the bundle{where}; {_AGAIN}") from None
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != wanted.get("sha256"):
        raise FileFormatError(f"{path}: changed: its SHA-256 is not the manifest's; {_AGAIN}")
    return content


# -- From a bundle to the engine that serves it, whichever that is. No torch here

ONNX = "model.onnx"
Choice = Literal["auto", "cpu", "cuda"]


def open_engine(bundle: Bundle, *, contexts: int = 1) -> Engine:
    """The engine that the bundle's manifest names, ready to run; close it after use.

    Where the plan is still to be built, that is ONNX Runtime on the processor. `contexts` is the
    number of execution contexts of a TensorRT engine, see `TrtEngine`.

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
    """A network in any bundle on ONNX Runtime; raises as :func:`open_engine` does.

    On the processor, and with the arithmetic of the file, unless `provider` is the execution
    provider of the manifest. `rounded`: float16 too is computed as the file says, see
    `export.half`, which needs the package onnx.
    """
    from eps_deploy.engines.ort import PROVIDERS, OrtEngine, Provider

    content = bundle.read(file)
    if rounded:
        from eps_deploy.export import half

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


# -- Warm-up and proof in one: the stored samples through an engine, before a client is let in

SAMPLES = "samples.npz"


def prove(bundle: Bundle, engine: Engine, stage: str) -> Parity:
    """Warm up, and compare with torch's logits.

    Raises EngineError when the engine fails, or answers something else than torch did.
    """
    images, logits, indices = _samples(bundle, engine)
    batches = _batches(engine)
    answers = accuracy.passes(engine.infer, images, batches)
    expected = [logits] * len(batches)
    limit = PARITY_LIMITS[bundle.manifest["precision"]]
    told = accuracy.compare(stage, expected, answers, indices.tolist(), limit, batches)
    if told.relative is None:
        raise EngineError("on the stored samples some of the engine's logits are not finite")
    if told.passed is False:
        raise EngineError(
            f"on the stored samples the engine differs from torch by {told.relative:.2g} of the"
            f" largest logit, and {told.limit:g} is the limit for {bundle.manifest['precision']};"
            " deploy the network again on this machine"
        )
    return told


def warm(bundle: Bundle, engine: Engine) -> None:
    """Run the bundle's samples, of which nobody knows what this engine must answer."""
    accuracy.passes(engine.infer, _samples(bundle, engine)[0], _batches(engine))


def _samples(bundle: Bundle, engine: Engine) -> tuple[Images, Logits, npt.NDArray[np.int64]]:
    """Images, torch's logits and indices; so many that the largest batch is a full one."""
    with np.load(io.BytesIO(bundle.read(SAMPLES)), allow_pickle=False) as samples:
        images, logits, indices = samples["images"], samples["logits"], samples["indices"]
    if len(images) < engine.max_batch:
        repeat = np.arange(engine.max_batch) % len(images)
        images, logits, indices = images[repeat], logits[repeat], indices[repeat]
    return images, logits, indices


def _batches(engine: Engine) -> list[int]:
    """All sizes on a GPU: TensorRT and cuDNN prepare each of them when it first comes."""
    on_cpu = engine.describe().get("provider") == "CPUExecutionProvider"
    largest = engine.max_batch
    return sorted({1, min(2, largest), largest} if on_cpu else range(1, largest + 1))


# -- Proving a bundle again, on any machine, from its files alone. No torch here
#
# That every file is the one that its manifest names is seen by `load_bundle` already; what follows
# is whether the engine still answers, on this machine, what the network answered in torch.

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
            answers = accuracy.passes(engine.infer, images, batches)
    except EngineError as error:
        return Check(name, None, str(error))
    except ModuleNotFoundError as error:
        return Check(name, None, cli.missing_package(error))
    expected = [logits] * len(batches)
    told = accuracy.compare(name, expected, answers, indices.tolist(), limit, batches)
    if told.relative is None:
        return Check(name, False, "some logits are not finite")
    return Check(
        name,
        told.passed,
        f"{len(images)} samples: largest difference {told.relative:.2g} of the largest logit,"
        f" limit {limit:g}; same class on {100 * told.top1_agreement:.2f} %",
    )
