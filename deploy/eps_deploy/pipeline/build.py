"""The networks of a deployment in torch, and as the ONNX files that engines are built from."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eps_core.checks import Check
from eps_core.files import replace_file
from eps_deploy.bench.accuracy import Infer
from eps_deploy.bench.machine import cpus
from eps_deploy.engines.base import Engine, EngineError, Images
from eps_deploy.engines.ort import OrtEngine, try_provider
from eps_deploy.engines.trt.build import BuildOptions, build, check_possible
from eps_deploy.engines.trt.cuda import Cuda, host_facts
from eps_deploy.engines.trt.engine import TrtEngine
from eps_deploy.engines.trt.plan import (
    LAYERS,
    PLAN,
    SIDECAR,
    Host,
    PlanMetadata,
    load_tensorrt,
    this_platform,
)
from eps_deploy.export import quantize as calibrating
from eps_deploy.export.export import Deployed, export_onnx, in_precision
from eps_deploy.export.half import rounded
from eps_deploy.export.mixed_precision import units
from eps_deploy.export.quantize import quantize
from eps_deploy.pipeline.inputs import Inputs
from eps_deploy.pipeline.options import Options
from eps_train.data.dataset import DataIdentity
from eps_train.gating import rewriting
from eps_train.models.spec import cost
from eps_train.training.forward import Precision

# -- What a deployment has finished so far, kept until it is done, so that a killed one can go on
#
# Each stage has a key: the SHA-256 of everything that its result depends on (digests of its
# inputs, its options, the versions of the packages that compute it). A result counts for that key
# alone, so a changed option or file repeats the stages behind it and no others.

_DIGITS = 16  # hexadecimal, of the key in a file's name


class Stages:
    """Results by stage in one folder.

    Args:
        folder: where they are kept; made with the first of them.
        resume: take what an earlier run left there. Otherwise all is done anew, and what is there
            stays until it is done again.

    Attributes:
        resumed: the stages whose results were taken from an earlier run, in order.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self._folder = folder
        self._resume = resume
        self.resumed: list[str] = []

    def data(self, name: str, inputs: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The plain data (as JSON has it) of a stage, from before or from `make`."""

        def encoded() -> bytes:
            return json.dumps(make(), allow_nan=False).encode()

        return json.loads(self.content(name, inputs, encoded))

    def content(self, name: str, inputs: Mapping[str, Any], make: Callable[[], bytes]) -> bytes:
        """The bytes of a stage, from before or from `make`.

        `inputs` are plain data. A result that was damaged since is made again.
        """
        path = self._path(name, inputs)
        if self._resume and (found := _intact(path)) is not None:
            self.resumed.append(name)
            return found
        made = make()
        replace_file(path, hashlib.sha256(made).digest() + made)
        return made

    def has(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether an earlier run left the result of this stage."""
        return self._resume and _intact(self._path(name, inputs)) is not None

    def left(self) -> bool:
        """Whether there is anything that a later run could take up."""
        return self._folder.is_dir() and any(self._folder.iterdir())

    def clear(self) -> None:
        """The deployment is done: nothing of it will be resumed."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str, inputs: Mapping[str, Any]) -> Path:
        return self._folder / f"{name}-{digest_of({'stage': name, **inputs})[:_DIGITS]}"


def digest_of(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _intact(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, found = content[:32], content[32:]
    return found if hashlib.sha256(found).digest() == digest else None


# What the bytes of an exported network depend on besides the network.
_EXPORTERS = ("eps-resnet", "torch", "onnx", "onnxscript")


@dataclass(frozen=True, kw_only=True, slots=True)
class Networks:
    """Each takes uint8 images; `baseline` is the trained one or the ε-network's full depth."""

    gated: Deployed
    compact: Deployed
    baseline: Deployed


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """The bytes of `model.onnx` and `baseline.onnx`, both in the same precision.

    `calibration` says on what int8 was calibrated: `samples`, `method`, `sha256` of the pixels;
    `kept` names the blocks that are in higher precision.
    """

    compact: bytes
    baseline: bytes
    calibration: dict[str, Any] | None = None
    kept: tuple[str, ...] = ()

    def files(self) -> dict[str, bytes]:
        """By their names in the bundle."""
        return {"model.onnx": self.compact, "baseline.onnx": self.baseline}

    def digests(self) -> dict[str, str]:
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files().items()}


def build_networks(sources: Inputs) -> Networks:
    """All three in evaluation mode on the CPU."""
    identity = sources.compact.data
    if sources.baseline is None:
        whole = sources.checkpoint.build_gated()
        baseline: nn.Module = rewriting.drop_taps(rewriting.drop_gates(whole))
    else:
        baseline = rewriting.drop_taps(sources.baseline.build_gated())
        identity = sources.baseline.data
    return Networks(
        gated=Deployed(sources.compact.gated(sources.checkpoint), sources.compact.data),
        compact=Deployed(sources.compact.build(), sources.compact.data),
        baseline=Deployed(baseline, identity),
    )


@contextmanager
def on_gpu(device: int, *networks: Deployed) -> Iterator[None]:
    """Compute these on the CUDA device of this index in the block, in float32 without TF32.

    Where torch sees no such device, nothing changes. Thousands of test images take a processor
    minutes to hours. Their logits differ by rounding: what must be equal is compared on the CPU.
    """
    if device >= torch.cuda.device_count():
        yield
        return
    target = torch.device("cuda", device)
    Precision("fp32", target)  # which switches TF32 off
    try:
        for network in networks:
            network.to(target)
        yield
    finally:
        for network in networks:
            network.to("cpu")
        torch.cuda.empty_cache()  # for the engine whose memory it is


def export(
    options: Options,
    sources: Inputs,
    networks: Networks,
    calibration: Images | None,
    stages: Stages,
    kept: Sequence[str] = (),
) -> Models:
    """Both networks as ONNX files in the precision asked for, calibrated on the same images.

    Args:
        calibration: raw training images, uint8 `[N, C, H, W]`, for int8.
        kept: blocks of the compact network that stay in higher precision.
    """
    origin = sources.baseline or sources.checkpoint
    compact = _Source(
        networks.compact,
        sources.compact.data,
        sources.compact.digest,
        tuple(kept),
        sources.blocks(),
    )
    baseline = _Source(networks.baseline, origin.data, origin.digest)
    return Models(
        compact=_model(options, "model", compact, calibration, stages),
        baseline=_model(options, "baseline", baseline, calibration, stages),
        calibration=None if calibration is None else _described(options, calibration),
        kept=tuple(kept),
    )


@dataclass(frozen=True, slots=True)
class _Source:
    network: Deployed
    identity: DataIdentity
    digest: str
    kept: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()


def _described(options: Options, calibration: Images) -> dict[str, Any]:
    return {
        "samples": len(calibration),
        "method": options.calibration_method,
        "sha256": calibrating.digest(calibration),
    }


def _model(
    options: Options, name: str, source: _Source, calibration: Images | None, stages: Stages
) -> bytes:
    key = {
        "digest": source.digest,
        "precision": options.precision.name,
        "kept": () if options.precision.quantized else source.kept,
        "versions": {name: version(name) for name in _EXPORTERS},
    }
    path = f"{name}.onnx"

    def exported() -> bytes:
        with tempfile.TemporaryDirectory(prefix="eps-deploy-") as folder:
            export_onnx(
                source.network.network,
                source.identity,
                Path(folder) / path,
                precision=options.precision,
                source=source.digest,
                kept=() if options.precision.quantized else source.kept,
            )
            return (Path(folder) / path).read_bytes()

    model = stages.content(f"export-{name}", key, exported)
    if calibration is None or (
        source.kept and set(source.kept) >= set(units(model, source.blocks))
    ):
        return model
    return stages.content(
        f"quantize-{name}",
        key | _described(options, calibration) | {"kept": source.kept},
        lambda: quantize(
            model,
            calibration,
            options.precision,
            method=options.calibration_method,
            kept=source.kept,
        ),
    )


def size(sources: Inputs, networks: Networks) -> dict[str, Any]:
    """Parameters and FLOPs of both networks, as `report.json` has them."""
    shape = sources.compact.data.input_shape
    baseline = cost(networks.baseline.network, shape)
    compact = cost(networks.compact.network, shape)
    return {
        "parameters": {"baseline": baseline.parameters, "compact": compact.parameters},
        "flops": {"baseline": baseline.flops, "compact": compact.flops},
    }


# -- TensorRT plans in a deployment: built on this machine's GPU, or left to the one that serves

DEFERRED = "--defer-build: the plan is built by the machine that serves the bundle"
BUILDER = "builder"
NO_REHEARSAL = {
    "what": "model.onnx through NVIDIA's parser and builder",
    "why": "needs no GPU but the package tensorrt-rtx-cu13, which is not installed",
}
_RTX = "tensorrt_rtx"
_EVERY = 5.0  # seconds between lines of progress
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A plan that was built on this machine.

    Attributes:
        content: what TensorRT loads.
        sidecar: what is known of it.
        layers: the inspector's JSON; "" when TensorRT gave none.
    """

    content: bytes
    sidecar: PlanMetadata
    layers: str

    def open(self, options: Options, name: str) -> Engine:
        """Ready to run. Raises EngineError."""
        return TrtEngine(self.content, self.sidecar, device=options.device, name=name)

    def files(self) -> dict[str, bytes]:
        """What a bundle holds of it, by name."""
        files = {PLAN: self.content, SIDECAR: self.sidecar.to_json()}
        if self.layers:
            files[LAYERS] = self.layers.encode()
        return files

    def pack(self) -> bytes:
        header = {"sidecar": self.sidecar.to_dict(), "layers": self.layers}
        return json.dumps(header).encode() + b"\n" + self.content

    @classmethod
    def unpack(cls, packed: bytes) -> Plan:
        line, _, content = packed.partition(b"\n")
        header = json.loads(line)
        sidecar = PlanMetadata.from_dict(header["sidecar"])
        return cls(content=content, sidecar=sidecar, layers=header["layers"])


def require_gpu(options: Options) -> None:
    """Raise EngineError, in one line with the remedy, unless plans can be built here."""
    try:
        trt, _, host = _machine(options)
        check_possible(options.precision, options.plan, host, trt)
    except EngineError as error:
        raise EngineError(
            f"--engine trt: {error}; or add --defer-build to have the plan built by the machine"
            " that serves, or use --engine ort"
        ) from error


def build_plan(options: Options, model: bytes, name: str, stages: Stages, say: Say) -> Plan:
    """The plan of an ONNX file; one that a killed run had built is taken up.

    Raises EngineError as `engines.trt.build.build` does.
    """
    trt, cuda, host = _machine(options)

    def make() -> bytes:
        say(f"building {name}.plan, which takes from seconds to many minutes")
        built = build(
            model,
            options.precision,
            _with_cache(options.plan),
            host=host,
            progress=_Progress(say),
            say=say,
            trt=trt,
            on_device=cuda.current,
        )
        layers = built.facts["information"]
        return Plan(content=built.plan, sidecar=built.sidecar(host), layers=layers).pack()

    sha256 = hashlib.sha256(model).hexdigest()
    key = {"onnx": sha256, "wishes": wishes(options), "host": asdict(host)}
    plan = Plan.unpack(stages.content(f"build-{name}", key, make))
    if remark := plan.sidecar.remark(host):
        say(remark)
    return plan


def rehearse(options: Options, model: bytes) -> Check | None:
    """Whether NVIDIA's parser and builder take the ONNX file, on a machine without a GPU.

    Those of TensorRT for RTX, whose builder needs none; None where it is not installed. Its plan is
    of another kind than TensorRT's, and is thrown away.
    """
    if importlib.util.find_spec(_RTX) is None:
        return None
    trt = importlib.import_module(_RTX)
    host = Host(
        tensorrt=trt.__version__,
        flavour=_RTX,
        compute_capability="12.0",  # what it builds for; nothing is run
        device="none",
        memory=0,
        platform=this_platform(),
    )
    text = f"TensorRT for RTX {trt.__version__} parses and builds model.onnx without a GPU"
    try:
        plain = replace(options.plan, version_compatible=False, hardware_compatibility="none")
        build(model, options.precision, plain, host=host, trt=trt)
    except EngineError as error:
        return Check(name=BUILDER, passed=False, value=None, limit=0.0, detail=str(error))
    return Check(name=BUILDER, passed=True, value=0.0, limit=0.0, detail=text)


def wishes(options: Options) -> dict[str, Any]:
    """How the plan is, or is to be, built; where its timing cache lies is no part of it."""
    found = asdict(options.plan)
    del found["timing_cache"]
    return {**found, "precision": options.precision.name}


def _machine(options: Options) -> tuple[Any, Cuda, Host]:
    trt = load_tensorrt()
    cuda = Cuda(options.device)
    return trt, cuda, host_facts(trt, cuda)


def _with_cache(wanted: BuildOptions) -> BuildOptions:
    """With the user's own cache folder (XDG Base Directory Specification), unless one is named."""
    if wanted.timing_cache is not None:
        return wanted
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:  # a user without a home, as containers have: no cache is kept
            return wanted
    return replace(wanted, timing_cache=Path(base) / "eps-resnet" / "tensorrt")


class _Progress:
    """A line of progress now and then: TensorRT reports hundreds of steps a second."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._next = time.monotonic() + _EVERY

    def __call__(self, phase: str, done: int, steps: int) -> bool:
        if time.monotonic() >= self._next:
            self._say(f"  {phase}: {done} of {steps}")
            self._next = time.monotonic() + _EVERY
        return True


# -- The engines of a deployment: how the baseline and the compact network are run, both alike

_CASTS = (
    "ONNX Runtime computes {name} on the CPU in float32, with casts around each convolution: its"
    " times say nothing about {name}"
)
_IN_TORCH = {
    "what": "model.onnx on the CPU",
    "why": "no runtime has bfloat16 convolutions there; torch computed them in its place",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One of the two networks, in all the forms that exist of it.

    Attributes:
        torch: as trained (or compacted), float32.
        reference: what its ONNX file says: int8 with true Q/DQ arithmetic, float16 rounded after
            every operation, both on the CPU; bfloat16 in torch.
        engine: what ships; None when it is built elsewhere.
        same: whether engine and reference are one and the same.
    """

    torch: Deployed
    reference: Infer
    engine: Engine | None
    same: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Variants:
    """Both networks, and the files that come with the engine that ships, by name."""

    compact: Variant
    baseline: Variant
    files: dict[str, bytes]

    def describe(self, options: Options) -> dict[str, Any]:
        """The engine that ships, for manifest and report."""
        if self.compact.engine is not None:
            return self.compact.engine.describe()
        return {
            "name": options.engine,
            "runtime": "tensorrt",
            "deferred": True,
            "max_batch": options.max_batch,
            **wishes(options),
        }


def require(options: Options) -> None:
    """Raise EngineError, in one line with the remedy, unless this machine has what is asked for."""
    if options.engine == "ort":
        try_provider(options.provider)
    elif not options.defer_build:
        require_gpu(options)


def why_no_times(options: Options) -> str | None:
    """Why the engine's times would mean nothing; None: they are measured."""
    half = options.precision.float != "float32"
    if options.engine == "ort" and options.provider == "cpu" and half:
        return _CASTS.format(name=options.precision.name)
    return DEFERRED if options.defer_build else None


def not_run(options: Options) -> list[dict[str, str]]:
    """What of the engines does not run here, and why."""
    return [
        *([_IN_TORCH] if options.precision.float == "bfloat16" else []),
        *([{"what": "TensorRT engine", "why": DEFERRED}] if options.defer_build else []),
    ]


@contextmanager
def opened(
    options: Options, networks: Networks, models: Models, stages: Stages, say: Callable[[str], None]
) -> Iterator[Variants]:
    """Both networks' engines for the length of a block."""
    with ExitStack() as stack:
        opener = _trt if options.engine == "trt" else _ort
        yield opener(options, networks, models, stages, say, stack)


def _ort(
    options: Options,
    networks: Networks,
    models: Models,
    stages: Stages,
    say: Callable[[str], None],
    stack: ExitStack,
) -> Variants:
    def side(torch: Deployed, model: bytes, name: str) -> Variant:
        engine = _ort_engine(options, model, name, stack)
        plain = options.precision.float == "float32" and not options.precision.quantized
        if options.provider == "cpu" and plain:
            return Variant(torch=torch, reference=engine.infer, engine=engine, same=True)
        held = reference(options, torch, model, name, stack)
        return Variant(torch=torch, reference=held, engine=engine)

    return Variants(
        compact=side(networks.compact, models.compact, "model.onnx"),
        baseline=side(networks.baseline, models.baseline, "baseline.onnx"),
        files={},
    )


def _ort_engine(options: Options, model: bytes, name: str, stack: ExitStack) -> OrtEngine:
    """As it is served."""
    return stack.enter_context(
        OrtEngine(
            model,
            name=name,
            provider=options.provider,
            threads=options.threads,
            max_batch=options.max_batch,
            tf32=options.precision.tf32,
        )
    )


def _trt(
    options: Options,
    networks: Networks,
    models: Models,
    stages: Stages,
    say: Callable[[str], None],
    stack: ExitStack,
) -> Variants:
    files: dict[str, bytes] = {}

    def side(torch: Deployed, model: bytes, name: str) -> Variant:
        engine: Engine | None = None
        if not options.defer_build:
            plan = build_plan(options, model, name, stages, say)
            engine = stack.enter_context(plan.open(options, f"{name}.plan"))
            if name == "model":
                files.update(plan.files())
        held = reference(options, torch, model, f"{name}.onnx", stack)
        return Variant(torch=torch, reference=held, engine=engine)

    return Variants(
        compact=side(networks.compact, models.compact, "model"),
        baseline=side(networks.baseline, models.baseline, "baseline"),
        files=files,
    )


def shipped(options: Options, torch: Deployed, model: bytes, stack: ExitStack) -> list[Infer]:
    """All that an accuracy is judged by: what the ONNX file says, and ONNX Runtime as it serves it.

    A TensorRT plan, which takes minutes to build, is left out.
    """
    held = reference(options, torch, model, "model.onnx", stack)
    if options.engine == "trt":
        return [held]
    return [held, _ort_engine(options, model, "model.onnx", stack).infer]


def reference(
    options: Options, torch: Deployed, model: bytes, name: str, stack: ExitStack
) -> Infer:
    """What the ONNX file says, by ONNX Runtime on all cores, or for bfloat16 by torch."""
    precision = options.precision
    if precision.float == "bfloat16":
        held = in_precision(torch.network, torch.identity, precision)
        stack.enter_context(on_gpu(options.device, held))
        return held.infer
    if precision.float == "float16":
        model = rounded(model)
    engine = OrtEngine(
        model,
        name=name,
        threads=cpus(),  # nobody times it, and it sees every test image
        max_batch=options.max_batch,
        exact_qdq=precision.quantized,
    )
    return stack.enter_context(engine).infer
